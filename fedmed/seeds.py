"""Seeds derived from what they are for, never from a global random state.

A seed depends on the study seed and on the words that name its purpose, so results
do not depend on the number of workers, on the order of replies or on the transport.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch

Purpose = str | int


def derive(root: int, *purpose: Purpose) -> int:
    """Derive a 63-bit seed from a root seed and the words that name its purpose.

    Args:
        root: The study's seed.
        purpose: Words and numbers, e.g. `"round", 3, "prostate/rumc", "shuffle"`.

    Returns:
        An integer in [0, 2**63), equal on every machine and Python version.

    Example:
        >>> derive(0, "round", 3) == derive(0, "round", 3)
        True
        >>> derive(0, "round", 3) == derive(0, "round", "3")
        False
    """
    text = "\x1f".join(f"{type(word).__name__}:{word}" for word in (root, *purpose))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def numpy_rng(root: int, *purpose: Purpose) -> np.random.Generator:
    """Give a NumPy generator for one purpose; see `derive`."""
    import numpy as np

    return np.random.default_rng(derive(root, *purpose))


def torch_rng(root: int, *purpose: Purpose) -> torch.Generator:
    """Give a torch CPU generator for one purpose; see `derive`."""
    import torch

    return torch.Generator().manual_seed(derive(root, *purpose))


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generators, and restore the processor's afterwards.

    Layers such as dropout draw from them and take no generator of their own.
    `torch.manual_seed` says the same, a hundred times slower.
    """
    import torch

    generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)
    try:
        yield
    finally:
        generator.set_state(before)
