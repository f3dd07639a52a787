"""Voxels of the phantom are data: with another content they need another version.

Generated hospitals are kept in the cache folder under a name made of their options and
`GENERATOR_VERSION`. Code that draws other voxels under the same version would leave old
ones in place, and two machines would train on different patients.
"""

import numpy as np
import pytest

from sites.phantoms.patient import visit
from sites.phantoms.plan import GENERATOR_VERSION, PhantomOptions, make_plan

DRAWN_BY = "1"
"""The version that drew what follows. Both change together."""

DRAWN = {
    "prostate_af/a": (318.35, 118.298, -24375.9, 646),
    "prostate_af/b": (764.356, 542.279, -102726.8, 792),
    "prostate_af/c": (174.03, 78.357, -10611.6, 1354),
    "prostate_af/d": (472.018, 163.235, -39403.9, 1259),
    "prostate_af/e": (1803.709, 1125.846, -208609.3, 606),
    "prostate_af/f": (370.444, 282.267, -63115.7, 890),
    "brain_abcd/set-a": (161.619, 101.124, -16780.5, 2647),
    "brain_abcd/set-b": (324.342, 203.061, -42601.2, 2920),
    "brain_abcd/set-c": (422.928, 267.824, -48037.4, 2876),
    "brain_abcd/set-d": (803.299, 517.115, -116791.6, 3318),
    "brain_audit/camcan": (164.319, 109.277, -14357.7, 2634),
    "brain_audit/ukbb": (287.731, 169.128, -27449.0, 2634),
    "brain_twins/twin-1": (366.084, 220.143, -37073.1, 3031),
    "brain_twins/twin-2": (336.463, 220.08, -24724.5, 3025),
    "heart_2mr_2ct/ct": (-312.299, 425.504, 18880.6, 1034),
    "heart_2mr_2ct/ct-low": (-314.569, 419.76, 26569.7, 1104),
    "heart_2mr_2ct/mr": (445.967, 428.236, -38166.4, 1531),
    "heart_2mr_2ct/mr-3t": (1220.074, 1201.346, -150987.2, 839),
    "abdomen_2mr_2ct/ct": (-552.666, 494.497, -3744.9, 520),
    "abdomen_2mr_2ct/ct-plain": (-566.921, 470.188, 5550.5, 679),
    "abdomen_2mr_2ct/mr": (236.458, 225.695, -26747.2, 612),
    "abdomen_2mr_2ct/mr-3t": (522.855, 496.2, -59016.8, 560),
    "chest_xray/jsrt": (1985.122, 721.71, -98568.3, 362),
    "chest_xray/montgomery": (1397.049, 442.495, -82485.0, 368),
    "chest_xray/portable": (914.815, 227.478, -49102.9, 370),
}
"""Preset and site: mean, standard deviation and a random projection of the image, and
the sum of the label, of patient 1 of seed 3."""


def test_numbers_are_those_of_this_version():
    assert GENERATOR_VERSION == DRAWN_BY


@pytest.mark.parametrize("name", DRAWN)
def test_the_generator_draws_what_its_version_says(name):
    preset, site = name.split("/")
    size = (32, 32, 1) if preset == "chest_xray" else (24, 24, 6)
    plan = make_plan(PhantomOptions(preset=preset, size=size, seed=3))
    scan = visit(plan.anatomy, plan.dials[site], plan.request(site, 1))
    image = scan.image.astype(float)
    weights = np.random.default_rng(0).standard_normal(image.shape)
    mean, deviation, projection, label = DRAWN[name]
    told = (
        "The phantom draws other voxels: raise GENERATOR_VERSION, say so under "
        "Numerics in the changelog, and write the new numbers here."
    )
    # A voxel that is rounded the other way on another processor is no difference.
    assert image.mean() == pytest.approx(mean, rel=1e-3), told
    assert image.std() == pytest.approx(deviation, rel=1e-3), told
    assert (weights * image).sum() == pytest.approx(projection, rel=2e-3), told
    assert scan.label.sum() == pytest.approx(label, abs=2), told
