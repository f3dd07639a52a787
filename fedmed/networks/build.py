"""Build a network from the words of a study, with weights that depend on the seed only.

A name is a file of this folder (`unet`, `residual_unet`, `classifier`...), a MONAI
network (`monai:UNETR`) or a class anywhere (`package.module:Class`).
"""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fedmed import networks
from fedmed.errors import ConfigError
from fedmed.networks.adapter import Adapter, add_adapters
from fedmed.networks.foreign import accepting_site, load_class
from fedmed.networks.monai import make_monai_network
from fedmed.networks.normalisation import Norm
from fedmed.networks.options import check_options, nearest
from fedmed.networks.squeeze import add_gates
from fedmed.seeds import derive, torch_rng
from fedmed.spelling import did_you_mean

_NORM_OPTIONS = {
    "norm": "kind",
    "norm_eps": "eps",
    "norm_momentum": "momentum",
    "norm_max_groups": "max_groups",
    "norm_affine": "affine",
}
_NO_NETWORKS = (
    "adapter",
    "amplitude_normalisation",
    "block",
    "build",
    "foreign",
    "metric_network",
    "monai",
    "normalisation",
    "options",
    "squeeze",
    "with_auxiliary",
)
ADDITIONS = ("nothing", "squeeze", "series_adapter", "parallel_adapter")
"""What `add` may name."""
_Convolution = nn.modules.conv._ConvNd
_Transposed = nn.modules.conv._ConvTransposeNd


def build_network(
    name: str,
    *,
    in_channels: int,
    num_classes: int,
    site_ids: Sequence[str] = (),
    seed: int,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> nn.Module:
    """Build a network on the CPU.

    Our own networks take `norm`, `norm_eps`, `norm_momentum`, `norm_max_groups` and
    `norm_affine` beside their own options. Each of their layers draws from a
    generator of its own, seeded by `seed` and the layer's name: equal layers of
    different networks start equal, in every dtype. Foreign networks initialise
    themselves from `seed`. Torch's global random state stays as it was.

    Every network takes `add`: "squeeze" puts a gate after every block, of reduction
    `squeeze_reduction` (16) with at least `squeeze_least_hidden` (1) hidden units;
    "series_adapter" and "parallel_adapter" put an adapter
    beside every convolution larger than 1x1. Other layers keep their names and their
    initial weights.

    `preset` names a set of options that a network of ours has ("paper", "tiny");
    options beside it count more.

    Args:
        name: "unet", "mlp", "monai:<Class>" or "package.module:Class".
        in_channels: Channels of the images (times slices, in 2.5D); features of a
            table.
        num_classes: Label classes, background included.
        site_ids: The sites, for `norm="batch_per_site"`.
        seed: Of the initial weights.
        dtype: Of the floating-point parameters.
        options: The network's own.

    Returns:
        A network called as `network(images, site=None)`, in training mode.

    Raises:
        ConfigError: Unknown name, option, preset or value; the message names the
            nearest.
        MissingDependencyError: If the network needs a package that is not there.

    Example:
        >>> network = build_network("unet", in_channels=1, num_classes=2, seed=0)
        >>> sorted(name for name, _ in network.named_children())
        ['decoder', 'encoder', 'head']
    """
    sizes = {"in_channels": in_channels, "num_classes": num_classes}
    options = with_preset(name, options)
    added = {
        "what": options.pop("add", "nothing"),
        "reduction": options.pop("squeeze_reduction", 16),
        "least_hidden": options.pop("squeeze_least_hidden", 1),
    }
    with _private_random_state(derive(seed, "initial_weights")):
        if name.startswith("monai:"):
            network = make_monai_network(
                name.removeprefix("monai:"), **sizes, options=options
            )
            _add(network, **added, norm=Norm())
        elif ":" in name:
            foreign = accepting_site(load_class(name))
            network = _make(foreign, {**sizes, **options}, name=name)
            _add(network, **added, norm=Norm())
        else:
            norm = _norm(options, site_ids)
            rest = {k: v for k, v in options.items() if k not in _NORM_OPTIONS}
            arguments = {**sizes, **rest, "norm": norm}
            network = _make(_own_class(name), arguments, name=name)
            _add(network, **added, norm=norm)
            initialise(network, seed)
    return network.to(dtype)


def with_preset(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Put a preset's options beneath a study's.

    Args:
        name: The network.
        options: Of the study; `preset` names the preset, if there is one.

    Raises:
        ConfigError: If the network has no such preset.

    Example:
        >>> with_preset("unet", {"preset": "tiny", "levels": 2})
        {'base_width': 8, 'levels': 2}
    """
    given = dict(options)
    preset = given.pop("preset", None)
    if preset is None:
        return given
    presets = {} if ":" in name else vars(_own_module(name))["PRESETS"]
    if preset not in presets:
        raise ConfigError(
            f"network {name!r} has no preset {preset!r}"
            + did_you_mean(str(preset), presets),
            hint=f"known are {', '.join(presets)}"
            if presets
            else "networks of other packages have none; leave model.preset out",
        )
    return {**presets[preset], **given}


def initialise(network: nn.Module, seed: int) -> None:
    r"""Draw the weights of every convolution and linear map anew.

    Weights are normal with variance $2 / n$, n the inputs that reach one output;
    biases are 0, scales 1, shifts 0, running statistics 0 and 1.

    Args:
        network: Made of torch's layers; changed in place.
        seed: Layers draw from `seed` and their own name.

    Raises:
        ConfigError: If a layer with parameters is of a type not known here.

    Source:
        He et al., Delving Deep into Rectifiers, ICCV 2015, arXiv:1502.01852, eq. (10).
    """
    for name, module in network.named_modules():
        if isinstance(module, _Convolution | nn.Linear):
            _initialise_layer(module, seed, name)
        elif isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm):
            module.reset_parameters()
        elif next(module.parameters(recurse=False), None) is not None:
            raise ConfigError(
                f"no initial weights are known for layer {name!r} "
                f"of type {type(module).__name__}"
            )
    for module in network.modules():
        if isinstance(module, Adapter):
            module.reset()


def known_networks() -> tuple[str, ...]:
    """Names of the networks in this folder."""
    found = (module.name for module in pkgutil.iter_modules(networks.__path__))
    return tuple(sorted(name for name in found if name not in _NO_NETWORKS))


def _initialise_layer(layer: nn.Module, seed: int, name: str) -> None:
    weight = layer.get_parameter("weight")
    rng = torch_rng(seed, "initial_weights", name)
    drawn = torch.empty(weight.shape, dtype=torch.float32).normal_(generator=rng)
    with torch.no_grad():
        weight.copy_(drawn * math.sqrt(2.0 / _inputs_per_output(layer)))
        if layer.bias is not None:
            layer.get_parameter("bias").zero_()


def _inputs_per_output(layer: nn.Module) -> float:
    if isinstance(layer, _Transposed):
        positions = math.prod(layer.kernel_size) / math.prod(layer.stride)
        return layer.in_channels / layer.groups * positions
    if isinstance(layer, _Convolution):
        return layer.in_channels / layer.groups * math.prod(layer.kernel_size)
    assert isinstance(layer, nn.Linear)
    return float(layer.in_features)


def _norm(options: Mapping[str, Any], site_ids: Sequence[str]) -> Norm:
    given = {_NORM_OPTIONS[k]: v for k, v in options.items() if k in _NORM_OPTIONS}
    return Norm(**given, site_ids=tuple(sorted(site_ids)))


def _add(
    network: nn.Module, *, what: Any, reduction: Any, least_hidden: Any, norm: Norm
) -> None:
    if what == "squeeze":
        add_gates(network, reduction=reduction, least_hidden=least_hidden)
    elif what == "series_adapter":
        add_adapters(network, "series", norm=norm)
    elif what == "parallel_adapter":
        add_adapters(network, "parallel", norm=norm)
    elif what != "nothing":
        raise ConfigError(
            f"model.add is {what!r}{did_you_mean(str(what), ADDITIONS)}",
            hint=f"known are {', '.join(ADDITIONS)}",
        )


def _own_module(name: str) -> ModuleType:
    if name not in known_networks():
        raise ConfigError(
            f"unknown network {name!r}",
            hint=f"nearest is {nearest(name, known_networks())!r}; known are "
            f"{', '.join(known_networks())}, monai:<Class> and package.module:Class",
        )
    return importlib.import_module(f"fedmed.networks.{name}")


def _own_class(name: str) -> type[nn.Module]:
    # One concept, one file, same name: unet.py holds UNet, ms_net.py holds MSNet.
    members = vars(_own_module(name))
    wanted = name.replace("_", "")
    found: type[nn.Module] = next(v for k, v in members.items() if k.lower() == wanted)
    return found


def _make(
    network_class: type[nn.Module], arguments: Mapping[str, Any], *, name: str
) -> nn.Module:
    check_options(network_class, arguments, name=name)
    parameters = inspect.signature(network_class).parameters.values()
    missing = [
        p.name
        for p in parameters
        if p.default is p.empty
        and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        and p.name not in arguments
    ]
    if missing:
        raise ConfigError(f"network {name!r} needs the option {', '.join(missing)}")
    return network_class(**arguments)


@contextmanager
def _private_random_state(seed: int) -> Iterator[None]:
    # Layers draw from torch's global generator when they are made; CPU only, so the
    # state of a GPU is never touched.
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)
