"""Which dataset modules there are, and opening one by name.

No registry: a dataset is a module that defines `open_sites`, either in `sites` or
anywhere as `package.module`.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import os
import pkgutil
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import sites
from fedmed.case import DatasetCard, SourceSite
from fedmed.errors import ConfigError, DataError, MissingDependencyError
from sites.options import suggest

DATA_VARIABLE = "FEDMED_DATA"
"""Environment variable that names the folder in which the data sets lie."""


@functools.cache
def list_datasets() -> dict[str, str]:
    """Find the dataset modules in `sites` without importing them.

    Returns:
        Module name -> first sentence of its docstring, sorted by name.
    """
    found = {}
    for name, path in _modules():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = {node.name for node in tree.body if isinstance(node, _FUNCTION)}
        if "open_sites" in functions:
            found[name] = (ast.get_docstring(tree) or name).splitlines()[0]
    return dict(sorted(found.items()))


def open_dataset(
    name: str, root: str | Path | None, options: Mapping[str, Any]
) -> tuple[DatasetCard, tuple[SourceSite, ...]]:
    """Open a data set: its card and its sites, with no image read yet.

    Args:
        name: A module in `sites`, e.g. "folder", or `package.module`.
        root: The data set's folder, or a folder that holds it under its usual name.
            None: the folder named by the environment variable FEDMED_DATA, unless the
            data set makes its own images.
        options: The module's options.

    Returns:
        The card as the options make it, and the sites in sorted order.

    Raises:
        ConfigError: If the module or an option is unknown.
        DataError: If the folder is not there or holds no usable data.
    """
    module = load_dataset_module(name)
    _check_option_names(module, options)
    folder = None
    if root is not None or not _makes_its_own(module):
        folder = find_root(root, usual_name=getattr(module, "FOLDER", ""))
    opened: tuple[SourceSite, ...] = module.open_sites(folder, **options)
    _refuse_twins(opened)
    where = {"root": folder} if "root" in _parameters(module.card) else {}
    card: DatasetCard = module.card(**where, **options)
    return card, opened


def load_dataset_module(name: str) -> ModuleType:
    """Import a dataset module by name.

    Args:
        name: As in `open_dataset`.

    Returns:
        The module, which has `open_sites` and `card`.

    Raises:
        ConfigError: If there is none of this name.
        MissingDependencyError: If the module is there and something it imports is not.
    """
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name) or (
        "." not in name and name not in list_datasets()
    ):
        known = [*list_datasets()]
        raise ConfigError(f"unknown data set {name!r}", hint=suggest(name, known))
    full_name = name if "." in name else f"{sites.__name__}.{name}"
    try:
        module = importlib.import_module(full_name)
    except ModuleNotFoundError as error:
        if full_name == error.name or full_name.startswith(f"{error.name}."):
            raise ConfigError(
                f"there is no module {full_name!r}",
                hint=suggest(name, [*list_datasets()]),
            ) from None
        raise MissingDependencyError(
            f"data set {name!r} needs the package {error.name!r}",
            hint=f"install {error.name}",
        ) from None
    if not hasattr(module, "open_sites") or not hasattr(module, "card"):
        raise ConfigError(
            f"module {full_name!r} is no data set",
            hint="a data set defines card(root, **options) and open_sites",
        )
    return module


def find_root(root: str | Path | None, *, usual_name: str = "") -> Path:
    """Find the folder in which a data set lies.

    Args:
        root: As in `open_dataset`.
        usual_name: Name of the data set's folder; if `root` holds one of this name it
            is taken.

    Returns:
        An existing folder.

    Raises:
        DataError: If it is not there.
    """
    named = os.environ.get(DATA_VARIABLE, "")
    if root is None and not named:
        raise DataError(
            "no data folder given",
            hint=f"name one in the study, or set {DATA_VARIABLE} to the folder in "
            "which the data sets lie",
        )
    folder = Path(os.path.expandvars(named if root is None else root)).expanduser()
    if usual_name and (folder / usual_name).is_dir():
        return folder / usual_name
    if not folder.is_dir():
        raise DataError(
            f"there is no data folder {folder.name!r}",
            hint=f"check the study's root, or set {DATA_VARIABLE} to the folder in "
            "which the data sets lie",
        )
    return folder


_FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def _modules() -> list[tuple[str, Path]]:
    return [
        (found.name, Path(folder) / f"{found.name}.py")
        for folder in sites.__path__
        for found in pkgutil.iter_modules([folder])
        if not found.ispkg
    ]


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def _makes_its_own(module: ModuleType) -> bool:
    """Whether a data set needs no folder: its `open_sites` takes None for `root`."""
    root = _parameters(module.open_sites).get("root")
    return root is None or "None" in str(root.annotation)


def _check_option_names(module: ModuleType, options: Mapping[str, Any]) -> None:
    """Name a wrong option of a module that lists its options as parameters."""
    parameters = _parameters(module.open_sites)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    known = [name for name in parameters if name != "root"]
    for name in options:
        if name not in known:
            raise ConfigError(
                f"unknown dataset option {name!r}", hint=suggest(str(name), known)
            )


def _refuse_twins(opened: tuple[SourceSite, ...]) -> None:
    counts = Counter(site.site_id for site in opened)
    if len(counts) < len(opened):
        twins = sorted(name for name, count in counts.items() if count > 1)
        raise DataError(f"two sites have one name: {', '.join(twins)}")
