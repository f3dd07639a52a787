"""Adapters: a few weights of a site's own beside every shared convolution.

They start at zero, where the network with adapters is the shared network bit for bit.

Source:
    Rebuffi et al., Learning multiple visual domains with residual adapters, NeurIPS
    2017, arXiv:1705.08045 (series); Efficient parametrization of multi-domain deep
    neural networks, CVPR 2018, arXiv:1803.10082 (parallel).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedmed.errors import ConfigError
from fedmed.networks.normalisation import Norm, make_norm

AdapterKind = Literal["series", "parallel"]

_Convolution = nn.modules.conv._ConvNd
_Transposed = nn.modules.conv._ConvTransposeNd
_POINTWISE = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_CONVOLVE = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_POINTWISE_TRANSPOSED = {
    1: nn.ConvTranspose1d,
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}


class Adapter(nn.Module):
    """What a site adds to the output of one shared convolution; all of it its own.

    `StatePartition` finds adapters by this type (the word "adapter").

    Attributes:
        projection: The 1x1 convolution V of the papers; zero at the start.
    """

    projection: nn.Module

    def reset(self) -> None:
        """Go back to adding nothing."""
        with torch.no_grad():
            self.projection.get_parameter("weight").zero_()


class SeriesAdapter(Adapter):
    """Adds V BN'(u) to the output u of a convolution.

    Args:
        convolution: The shared convolution, of c output channels; V is c to c.
        norm: Kind and constants of BN'.
    """

    def __init__(self, convolution: _Convolution, norm: Norm) -> None:
        super().__init__()
        width, dims = convolution.out_channels, len(convolution.kernel_size)
        self.norm = make_norm(norm, width, spatial_dims=dims)
        self.projection = _POINTWISE[dims](width, width, kernel_size=1, bias=False)
        self.reset()

    def forward(self, inputs: Tensor, output: Tensor) -> Tensor:
        """Correct the convolution's output."""
        del inputs
        corrected: Tensor = output + self.projection(self.norm(output))
        return corrected


class ParallelAdapter(Adapter):
    """Adds V a to the output of a convolution of a.

    Args:
        convolution: The shared convolution; V has its channels and strides.

    Raises:
        ConfigError: If a 1x1 kernel cannot give an output of the same size.
    """

    def __init__(self, convolution: _Convolution) -> None:
        super().__init__()
        classes: Mapping[int, type[_Convolution]] = _POINTWISE
        options: dict[str, Any] = {"kernel_size": 1, "stride": convolution.stride}
        if isinstance(convolution, _Transposed):
            classes = _POINTWISE_TRANSPOSED
            options["output_padding"] = _missing_size(convolution)
        else:
            _require_same_size(convolution)
        self.projection = classes[len(convolution.kernel_size)](
            convolution.in_channels, convolution.out_channels, bias=False, **options
        )
        self.reset()

    def forward(self, inputs: Tensor, output: Tensor) -> Tensor:
        """Correct the convolution's output."""
        if not isinstance(self.projection, _Transposed):
            added: Tensor = self.projection(inputs)
            return output + added
        # Each input voxel meets one output voxel. torch 2.13's own layer corrupts
        # memory here (CPU, channels last, 16 to 8 channels, backward).
        weight = self.projection.weight.transpose(0, 1)
        strides = self.projection.stride
        places: Any = (..., *(slice(None, None, stride) for stride in strides))
        corrected = output.clone()
        corrected[places] += _CONVOLVE[len(strides)](inputs, weight)
        return corrected


def add_adapters(network: nn.Module, kind: AdapterKind, *, norm: Norm) -> None:
    """Put an adapter beside every convolution whose kernel is larger than 1x1.

    Convolutions keep their names; each gets a child, `adapter`.

    Args:
        network: Changed in place.
        kind: "series" or "parallel".
        norm: Of the series adapters. Every site has its own adapters, so that there
            is no norm per site inside of them.

    Raises:
        ConfigError: If there is no such convolution, or one cannot have an adapter.
    """
    if norm.kind == "batch_per_site":
        raise ConfigError(
            "adapters and model.norm: batch_per_site in one network",
            hint="Set model.norm: batch; the strategies series_adapter and "
            "parallel_adapter keep normalisation and adapters at each site.",
        )
    wide = [
        module
        for module in network.modules()
        if isinstance(module, _Convolution) and math.prod(module.kernel_size) > 1
    ]
    if not wide:
        raise ConfigError(
            f"network {type(network).__name__} has no convolution to adapt",
            hint="Set model.name: unet or residual_unet.",
        )
    for convolution in wide:
        adapter = (
            SeriesAdapter(convolution, norm)
            if kind == "series"
            else ParallelAdapter(convolution)
        )
        convolution.add_module("adapter", adapter)
        convolution.register_forward_hook(_adapted)


def _adapted(convolution: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    # A function of this module and not a closure: networks are copied and pickled.
    corrected: Tensor = convolution.get_submodule("adapter")(inputs[0], output)
    return corrected


def _missing_size(layer: Any) -> tuple[int, ...]:
    """How much a transposed 1x1 kernel must append to end where a larger one ends."""
    missing = tuple(
        dilation * (kernel - 1) - 2 * padding + appended
        for dilation, kernel, padding, appended in zip(
            layer.dilation,
            layer.kernel_size,
            layer.padding,
            layer.output_padding,
            strict=True,
        )
    )
    if any(not 0 <= m < s for m, s in zip(missing, layer.stride, strict=True)):
        raise _not_alike(layer)
    return missing


def _require_same_size(layer: Any) -> None:
    if layer.padding == "same":
        return
    sizes = zip(layer.padding, layer.dilation, layer.kernel_size, strict=True)
    if layer.padding == "valid" or any(2 * p != d * (k - 1) for p, d, k in sizes):
        raise _not_alike(layer)


def _not_alike(layer: Any) -> ConfigError:
    return ConfigError(
        "a parallel adapter beside a convolution of kernel "
        f"{tuple(layer.kernel_size)} and padding {layer.padding}: a 1x1 kernel gives "
        "an output of another size",
        hint="Use strategy series_adapter, or model.name: residual_unet.",
    )
