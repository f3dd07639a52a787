"""From an exception inside a hospital to the one sentence that may leave it.

A foreign exception's text is never repeated: a `FileNotFoundError` names a patient's
folder, a `KeyError` a patient. It becomes its type and the place in our code. What our
own errors say was written to be read elsewhere, but may quote what it met, so paths,
file names and what looks like a person, an identifier or a date are taken out.

Patterns cannot know every name. The rule for whoever writes an error stays: no patient
and no path in a message; this module is the second line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace

from fedmed.errors import FedMedError
from fedmed.message import SiteFailure
from fedmed.transports.failure import scrubbed

MAX_LENGTH = 300

_LONGEST_READ = 2000
_SHORTEST_IN_WORDS = 4

_OUR_PACKAGES = frozenset({"fedmed", "sites", "strategies"})
_HARMLESS_STEM = re.compile(
    r"policy|study|study\.lock|participants|dataset|dataset_description|ledger|cases"
    r"|rounds|summary|model|round-\d+|stage-\d+-[0-9a-f]+"
    r"|(case|image|img|mask|label)[-_]?\d{0,4}"
)
_EXTENSION = (
    r"nii\.gz|nii|dcm|dicom|ima|img|hdr|mha|mhd|nrrd|png|jpe?g|tiff?|bmp|gif|ppm|csv"
    r"|tsv|xlsx?|h5|hdf5|npy|npz|mat|pt|pth|safetensors|jsonl?|ya?ml|txt|pdf|zip|tar|gz"
)
# People's folders hold spaces: whatever stands between the first and the last slash
# goes, and capitalised words next to it.
_NAMES_AFTER = r"(?:[ ,]+[A-Z][\w^-]*)*"
_NAMES_BEFORE = r"(?:\b[A-Z][\w^-]*[ ,]+)*"

_QUOTED_PATH = re.compile(r"""(["'`])(?:(?!\1).)*[\\/](?:(?!\1).)*\1""")
_ABSOLUTE_PATH = re.compile(
    r"(?<![\w<>.])(?:file:)?(?:~\w*|\b[A-Za-z]:|\$\w+|%\w+%)?[\\/]"
    rf"""(?:[^"'`]*[\\/])?[^\s"'`:;,()]*{_NAMES_AFTER}"""
)
_FRACTION = r"\d{1,3}/\d{1,3}(?![\w/\\])"
_RELATIVE_PATH = re.compile(
    rf"""(?!(?<!\S){_FRACTION}){_NAMES_BEFORE}(?<!\S)(?!{_FRACTION})"""
    r"""[^\s"'`]*[\\/][^\s"'`:;,()]*"""
)
_FILE = re.compile(
    rf"""(?P<names>{_NAMES_BEFORE})(?P<stem>[^\s"'`<>,;:()\[\]=]+?)"""
    rf"\.(?P<extension>(?i:{_EXTENSION}))\b(?!\.\w)",
)
_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"[\w.+-]+@[\w.-]+"), "<address>"),
    (re.compile(r"\b\w+(?:\^\w*)+"), "<name>"),  # DICOM: DOE^JANE^^
    (re.compile(r"(['\"])[A-Z]\w+[ ,]+[A-Z]\w[^'\"]*\1"), "<name>"),
    (re.compile(r"\b\d+(?:\.\d+){4,}\b"), "<uid>"),
    (
        re.compile(
            r"\b(?:\d{4}[-./]\d{1,2}[-./]\d{1,2}|\d{1,2}[-./]\d{1,2}[-./]\d{2,4})\b"
        ),
        "<date>",
    ),
    (
        re.compile(
            r"\b(?:mrn|pid|patient(?:[ _-]?(?:id|name))?)\b[\s:=#'\"]*"
            r"(?=[\w^-]*[\dA-Z])[\w^-]*\d[\w^-]*|\bmrn[\w-]*\d[\w-]*",
            re.IGNORECASE,
        ),
        "<id>",
    ),
    (re.compile(r"(?<!\d)(?<!\d\.)(?<!round-)(?<!stage-)\d{6,}"), "<number>"),
)


def describe(
    error: BaseException,
    *,
    keep: Collection[str] = (),
    remove: Collection[str] | None = (),
) -> SiteFailure:
    """Say why a site gives no reply, in words that may leave the hospital.

    Args:
        error: What was raised.
        keep: See `scrub`.
        remove: See `scrub`.
    """
    return replace(scrubbed(error), detail=scrub(error, keep=keep, remove=remove))


def scrub(
    error: BaseException,
    *,
    keep: Collection[str] = (),
    remove: Collection[str] | None = (),
) -> str:
    """Put an exception into one sentence that may leave the hospital.

    Args:
        error: What was raised.
        keep: Words with slashes that are no paths: the site's id, entries' names.
        remove: Words that must not leave whatever they look like: the names of cases
            where the policy does not let them go. None: they must not leave, and
            nobody knows them; then even our own words stay inside.

    Example:
        >>> from fedmed.errors import CaseError
        >>> scrub(CaseError("/data/DOE^JANE/t2.nii.gz: spacing is 0"))
        '<path>: spacing is 0'
        >>> scrub(KeyError("Jane Doe"))
        'KeyError outside our code'
    """
    if isinstance(error, FedMedError) and remove is not None:
        return scrub_text(error.message, keep=keep, remove=remove)
    return f"{type(error).__name__} {_place(error)}"


def scrub_text(
    text: str, *, keep: Collection[str] = (), remove: Collection[str] = ()
) -> str:
    """Take paths, file names and what looks like a person out of a sentence.

    Args:
        text: Our own words, which may quote what was met.
        keep: See `scrub`.
        remove: See `scrub`.

    Example:
        >>> scrub_text("site b/rumc: case.nii.gz in x/y holds 3/4", keep=["b/rumc"])
        'site b/rumc: case.nii.gz in <path> holds 3/4'
    """
    # Names go first: cut off in the middle, a name would not be found.
    text = _readable(_without(text, keep=keep, remove=remove))
    text = _without(text, keep=keep, remove=map(_readable, remove))[:_LONGEST_READ]
    text, restore = _protected(text, keep)
    text = _QUOTED_PATH.sub("<path>", text)
    text = _ABSOLUTE_PATH.sub("<path>", text)
    text = _RELATIVE_PATH.sub("<path>", text)
    text = _FILE.sub(_file, text)
    for pattern, substitute in _PATTERNS:
        text = pattern.sub(substitute, text)
    text = restore(text)
    return text if len(text) <= MAX_LENGTH else text[: MAX_LENGTH - 3] + "..."


def _readable(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _without(text: str, *, keep: Collection[str], remove: Iterable[str]) -> str:
    """Take words out in one pass, so that what stays is not mistaken for one."""
    names = set(filter(None, remove))
    if not names:
        return text
    patterns = {name: _wherever_met(name) for name in names}
    # A word that is both stays: the site's name is known outside.
    patterns |= {word: _whole(word) for word in filter(None, keep)}
    longest = sorted(patterns, key=len, reverse=True)
    either = "|".join(patterns[word] for word in longest)
    return re.sub(either, lambda m: m[0] if m[0] in keep else "<removed>", text)


def _wherever_met(name: str) -> str:
    """A very short name, like "1", is only met as a word of its own."""
    word = f"(?i:{re.escape(name)})"
    if len(name) >= _SHORTEST_IN_WORDS:
        return word
    return rf"(?<![^\W_]){word}(?![^\W_])"


def _whole(word: str) -> str:
    return rf"(?<![\w./\\-]){re.escape(word)}(?![\w/\\-])"


def _protected(text: str, keep: Collection[str]) -> tuple[str, Callable[[str], str]]:
    """Hide words that stay behind single private-use characters."""
    hidden: dict[str, str] = {}
    text = re.sub(r"[\ue000-\uf8ff]", " ", text)
    for number, word in enumerate(sorted(filter(None, keep), key=len, reverse=True)):
        mark = chr(0xE000 + number % 0x1900)
        hidden[mark] = word
        # Only as a word of its own: inside a longer path it is a part of that path.
        text = re.sub(_whole(word), mark, text)

    def restore(scrubbed_text: str) -> str:
        return "".join(hidden.get(character, character) for character in scrubbed_text)

    return text, restore


def _file(match: re.Match[str]) -> str:
    stem, extension = match["stem"], match["extension"]
    if _HARMLESS_STEM.fullmatch(stem.lower()):
        return match[0]
    return f"<file>.{extension}"


def _place(error: BaseException) -> str:
    """Name the innermost line of ours that the exception passed through."""
    place = "outside our code"
    trace = error.__traceback__
    while trace is not None:
        module = str(trace.tb_frame.f_globals.get("__name__", ""))
        if module.partition(".")[0] in _OUR_PACKAGES:
            place = f"in {module}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place
