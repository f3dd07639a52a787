"""Could a hospital have computed this? What a server asks of statistics before use.

A statistic goes into a loss over all sites, so that one impossible row would come back
to every other site as a derivative. Each check gives what is wrong in a few words, ""
if nothing is; the site is then refused by name, and the others go on.
"""

from __future__ import annotations

from torch import Tensor

from fedmed.message import State
from fedmed.training.statistic_bank import PRESENT

_TOLERANCE = 1e-3
"""Of the sum of a row of probabilities, in float32."""

_LEAST_LOG = -1e3
"""Of a probability. Its derivatives go to all other sites, and grow with it."""


def rows_problem(state: State, name: str = "rows", *, noised: bool = False) -> str:
    """Check rows of log-probabilities, one for each class, and the marks of those told.

    Args:
        state: `name`, (L, L), and "present", (L,) of zeros and ones; other tensors are
            passed over.
        name: Of the rows.
        noised: The site's policy may have clipped and noised both: then only their
            size is checked.

    Example:
        >>> import torch
        >>> rows_problem({"rows": torch.zeros(1, 1), "present": torch.ones(1)})
        ''
        >>> rows_problem({"rows": torch.full((1, 1), 9.0), "present": torch.ones(1)})
        'rows are no log-probabilities'
    """
    if name not in state or PRESENT not in state:
        return f"{name} or their marks are missing"
    rows_LL, present_L = state[name], state[PRESENT]
    if rows_LL.ndim != 2 or tuple(present_L.shape) != (len(rows_LL),):
        return f"{name} and their marks do not fit together"
    told_NL = rows_LL[present_L > 0.5].double()
    if noised:
        return _size_problem(told_NL, name, -_LEAST_LOG)
    if not _are_marks(present_L):
        return f"marks of {name} are neither 0 nor 1"
    sums_N = told_NL.logsumexp(dim=1)
    if bool((sums_N.abs() > _TOLERANCE).any() | (told_NL < _LEAST_LOG).any()):
        return f"{name} are no log-probabilities"
    return ""


def means_problem(
    state: State, *, means: str, marks: str, largest: float, noised: bool = False
) -> str:
    """Check mean embeddings, (T, D), and their marks, (T,).

    Args:
        state: Holds both; other tensors are passed over.
        means: Name of the embeddings.
        marks: Name of the marks.
        largest: Largest number that an embedding may hold, up to its sign.
        noised: As of `rows_problem`.
    """
    if means not in state or marks not in state:
        return f"{means} or their marks are missing"
    means_TD, marks_T = state[means], state[marks]
    if means_TD.ndim != 2 or tuple(marks_T.shape) != (len(means_TD),):
        return f"{means} and their marks do not fit together"
    if not noised and not _are_marks(marks_T):
        return f"marks of {means} are neither 0 nor 1"
    return _size_problem(means_TD, means, largest)


def vectors_problem(
    state: State, *, vectors: str, kinds: str, width: int, largest: float
) -> str:
    """Check embeddings of single examples, (N, D), and the kind of each, (N,).

    Args:
        state: Holds both; other tensors are passed over.
        vectors: Name of the embeddings.
        kinds: Name of the kinds.
        width: D.
        largest: As of `means_problem`.
    """
    if vectors not in state or kinds not in state:
        return f"{vectors} or their kinds are missing"
    vectors_ND, kinds_N = state[vectors], state[kinds]
    if tuple(vectors_ND.shape) != (len(kinds_N.reshape(-1)), width):
        return (
            f"{vectors} of shape {tuple(vectors_ND.shape)} came with "
            f"{kinds_N.numel()} kinds; expected as many rows of {width}"
        )
    if kinds_N.ndim != 1 or kinds_N.is_floating_point() or bool((kinds_N < 0).any()):
        return f"kinds of {vectors} are no classes"
    return _size_problem(vectors_ND, vectors, largest)


def _are_marks(marks: Tensor) -> bool:
    return bool(((marks == 0) | (marks == 1)).all())


def _size_problem(values: Tensor, name: str, largest: float) -> str:
    size = float(values.abs().max()) if values.numel() else 0.0
    if size <= largest:
        return ""
    return f"{name} are as large as {size:.3g}; at most {largest:.3g} is plausible"
