"""Episodic methods whose process dies at one hospital, in an episode's second half."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import Any

from fedmed.message import State
from fedmed.strategy import Outcome, SiteContext, at_site
from strategies.masf import MASF
from strategies.mldg import MLDG
from strategies.saml import SAML


def die_at(site: SiteContext, victim: str) -> None:
    if site.site_id == victim:
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class KilledMASF(MASF):
    victim: str = ""

    @at_site
    def meta_gradient(
        self, site: SiteContext, weights: State, **content: Any
    ) -> Outcome:
        die_at(site, self.victim)
        return MASF.meta_gradient(self, site, weights, **content)


@dataclass(frozen=True)
class KilledSAML(SAML):
    victim: str = ""

    @at_site
    def meta_gradient(
        self, site: SiteContext, weights: State, **content: Any
    ) -> Outcome:
        die_at(site, self.victim)
        return SAML.meta_gradient(self, site, weights, **content)


@dataclass(frozen=True)
class KilledMLDG(MLDG):
    """Dies at the second gradient of an episode, which is at w'."""

    order: Any = "second"
    victim: str = ""

    @at_site
    def curvature(self, site: SiteContext, weights: State, **content: Any) -> Outcome:
        die_at(site, self.victim)
        return MLDG.curvature(self, site, weights, **content)
