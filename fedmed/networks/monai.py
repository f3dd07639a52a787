"""Any MONAI network by its name: `monai:UNETR`, `monai:DenseNet121`...

MONAI is optional and slow to import: it is imported when a network is asked for.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from fedmed.errors import ConfigError, MissingDependencyError
from fedmed.networks.foreign import accepting_site
from fedmed.networks.options import check_options, nearest

_INPUT_NAMES = ("in_channels", "n_input_channels")
_OUTPUT_NAMES = ("out_channels", "num_classes", "n_classes")


def make_monai_network(
    name: str, *, in_channels: int, num_classes: int, options: Mapping[str, Any]
) -> nn.Module:
    """Make a network of `monai.networks.nets`.

    Parameters keep MONAI's own names, so its top-level submodules are the parts and
    published weights fit.

    Args:
        name: A class of `monai.networks.nets`.
        in_channels: Goes to the option by which that class takes input channels.
        num_classes: Goes to the option by which that class takes output channels.
        options: The class's own options, e.g. `spatial_dims`.

    Returns:
        An instance of a subclass of the named class.

    Raises:
        MissingDependencyError: If MONAI is not installed.
        ConfigError: Unknown class or option; the message names the nearest.
    """
    network_class = _find_class(name)
    parameters = inspect.signature(network_class).parameters
    options = dict(options)
    for names, value in ((_INPUT_NAMES, in_channels), (_OUTPUT_NAMES, num_classes)):
        option = next((n for n in names if n in parameters), None)
        if option is not None:
            options.setdefault(option, value)
    check_options(network_class, options, name=f"monai:{name}")
    try:
        network = accepting_site(network_class)(**options)
    except TypeError as error:
        raise ConfigError(f"network 'monai:{name}': {error}") from error
    return network


def _find_class(name: str) -> type[nn.Module]:
    try:
        from monai.networks import nets
    except ImportError as error:
        raise MissingDependencyError(
            f"network 'monai:{name}' needs the package monai, which is not installed",
            hint="pip install 'fedmed[monai]'",
        ) from error
    known = [n for n, v in vars(nets).items() if _is_network(v)]
    if name not in known:
        raise ConfigError(
            f"monai.networks.nets has no network {name!r}",
            hint=f"nearest is {nearest(name, known)!r}",
        )
    found: type[nn.Module] = getattr(nets, name)
    return found


def _is_network(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)
