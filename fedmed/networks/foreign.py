"""Networks of other packages, made to be called like ours."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from torch import Tensor, nn

from fedmed.errors import ConfigError


class AcceptsSite:
    """Lets a network that knows no sites be called like ours."""

    def forward(self, images: Tensor, site: str | None = None) -> Any:
        """Call the network; `site` changes nothing."""
        del site
        return super().forward(images)  # type: ignore[misc]


def accepting_site(network_class: type[nn.Module]) -> type[nn.Module]:
    """Give a class whose forward takes `site`: the class itself or a subclass.

    A subclass and not a wrapper, so that parameters keep their names, top-level
    submodules are the parts, and published weights fit.
    """
    if "site" in inspect.signature(network_class.forward).parameters:
        return network_class
    adapted: type[nn.Module] = type(
        network_class.__name__, (AcceptsSite, network_class), {}
    )
    return adapted


def load_class(name: str) -> type[nn.Module]:
    """Import "package.module:Class".

    Raises:
        ConfigError: If there is no such class or it is no network.
    """
    module_name, _, class_name = name.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"network {name!r} cannot be loaded: {error}",
            hint="the package must be installed at the server and at every site",
        ) from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ConfigError(f"network {name!r} is not a class of torch.nn.Module")
    return found
