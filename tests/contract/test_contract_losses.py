"""What every loss of `fedmed.losses` promises, found by walking the package."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from fedmed.case import UNKNOWN_LABEL
from fedmed.errors import DataError
from fedmed.losses.build import build_loss, loss_names

NUM_CLASSES = 3
SHAPES = {"class": (5,), "2d": (2, 3, 4), "3d": (2, 2, 3, 2)}

every_loss = pytest.mark.parametrize("name", [*loss_names(), "+".join(loss_names())])
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def draw(shape, *, dtype=torch.float64, unknown=True):
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(shape[0], NUM_CLASSES, *shape[1:], generator=generator)
    labels = torch.randint(0, NUM_CLASSES, shape, generator=generator)
    labels.view(-1)[:NUM_CLASSES] = torch.arange(NUM_CLASSES)  # no class is empty
    if unknown:
        labels.view(-1)[NUM_CLASSES] = UNKNOWN_LABEL
    return logits.to(dtype), labels


def perfect(labels, margin=80.0):
    classes = torch.arange(NUM_CLASSES).reshape(-1, *[1] * (labels.ndim - 1))
    return margin * (labels.unsqueeze(1) == classes).double()


@every_loss
@every_shape
def test_first_and_second_derivatives_are_right(name, shape):
    loss = build_loss(name)
    logits, labels = draw(shape)
    logits.requires_grad_()
    assert gradcheck(lambda x: loss(x, labels), logits)
    assert gradgradcheck(lambda x: loss(x, labels), logits)


# torch compiles its forward-mode formulas with its own deprecated compiler.
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@every_loss
def test_forward_mode_over_reverse_mode_gives_the_hessian_product(name):
    loss = build_loss(name)
    logits, labels = draw(SHAPES["2d"])
    direction = torch.randn(
        logits.shape, dtype=logits.dtype, generator=torch.Generator().manual_seed(8)
    )
    gradient = torch.func.grad(lambda x: loss(x, labels))
    _, product = torch.func.jvp(gradient, (logits,), (direction,))
    step = 1e-6
    numeric = gradient(logits + step * direction) - gradient(logits - step * direction)
    torch.testing.assert_close(product, numeric / (2 * step), rtol=1e-6, atol=1e-9)


@every_loss
@every_shape
def test_a_perfect_prediction_costs_nothing_and_any_other_does(name, shape):
    loss = build_loss(name)
    logits, labels = draw(shape)
    assert loss(perfect(labels), labels).item() == pytest.approx(0, abs=1e-6)
    assert loss(logits, labels).item() > 0.05


@every_loss
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_an_empty_mask_gives_a_finite_loss_and_gradient(name, scale):
    logits, labels = draw(SHAPES["2d"], dtype=torch.float32, unknown=False)
    logits = (logits * scale).requires_grad_()
    loss = build_loss(name)(logits, torch.zeros_like(labels))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert gradient.isfinite().all()


@every_loss
@every_shape
def test_unknown_voxels_take_no_part(name, shape):
    loss = build_loss(name)
    logits, labels = draw(shape)
    unknown = labels == UNKNOWN_LABEL
    assert unknown.any()
    moved = torch.where(unknown.unsqueeze(1), logits + 3 * logits.sin(), logits)
    assert not torch.equal(moved, logits)
    torch.testing.assert_close(loss(moved, labels), loss(logits, labels))
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(logits, labels), logits)
    gradient = gradient.movedim(1, -1)
    assert not gradient[unknown].any()
    assert gradient[~unknown].any()


@every_loss
def test_leaving_out_unknown_voxels_equals_marking_them(name):
    loss = build_loss(name)
    logits, labels = draw((2, 3, 4), unknown=False)
    marked = labels.clone()
    marked[:, :, 3:] = UNKNOWN_LABEL
    torch.testing.assert_close(
        loss(logits, marked), loss(logits[..., :3], labels[..., :3])
    )


@every_loss
@every_shape
def test_a_batch_of_unknown_voxels_gives_zero_and_zero_gradient(name, shape):
    logits, labels = draw(shape)
    logits.requires_grad_()
    loss = build_loss(name)(logits, torch.full_like(labels, UNKNOWN_LABEL))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 0
    assert not gradient.any()


@every_loss
def test_label_dtype_does_not_matter_and_arguments_are_unchanged(name):
    loss = build_loss(name)
    logits, labels = draw(SHAPES["3d"])
    before = logits.clone(), labels.clone()
    assert torch.equal(loss(logits, labels), loss(logits, labels.to(torch.uint8)))
    assert torch.equal(logits, before[0])
    assert torch.equal(labels, before[1])


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_lifted(name, dtype):
    loss = build_loss(name)
    # 65,536 voxels: sums in float16 would be infinite, in bfloat16 stuck at 256.
    logits, labels = draw((1, 256, 256), dtype=dtype)
    value = loss(logits, labels)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(logits.double(), labels).float())


@every_loss
def test_autocast_does_not_lower_the_precision(name):
    loss = build_loss(name)
    logits, labels = draw(SHAPES["2d"], dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(logits, labels)
    assert torch.equal(inside, loss(logits, labels))


@every_loss
def test_float64_stays(name):
    assert build_loss(name)(*draw(SHAPES["2d"])).dtype == torch.float64


@every_loss
@pytest.mark.parametrize("strange", [NUM_CLASSES, -1, -100])
def test_a_label_that_is_no_class_is_refused(name, strange):
    logits, labels = draw(SHAPES["2d"])
    labels[0, 0, 0] = strange
    with pytest.raises(DataError, match=rf"Labels \[{strange}\]"):
        build_loss(name)(logits, labels)


@every_loss
def test_labels_with_a_channel_are_refused(name):
    logits, labels = draw(SHAPES["2d"])
    with pytest.raises(DataError, match="shape"):
        build_loss(name)(logits, labels.unsqueeze(1))
