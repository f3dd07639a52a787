"""Check that a Flower bundle holds code of the three packages and nothing else."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

MAX_BYTES = 10_000_000
PACKAGES = ("fedmed/", "sites/", "strategies/")


def problems(bundle: Path) -> list[str]:
    """Name every entry that has no business in a bundle."""
    with zipfile.ZipFile(bundle) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
    found = [
        f"{name} does not belong in the bundle"
        for name in names
        if name not in {"pyproject.toml", ".info/CONTENT"}
        and not (name.startswith(PACKAGES) and name.endswith(".py"))
    ]
    found += [
        f"{prefix} is missing"
        for prefix in PACKAGES
        if not any(name.startswith(prefix) for name in names)
    ]
    if bundle.stat().st_size > MAX_BYTES:
        found.append(f"{bundle.stat().st_size} bytes, allowed are {MAX_BYTES}")
    return found


def main() -> None:
    """Check the bundle named on the command line."""
    bundle = Path(sys.argv[1])
    found = problems(bundle)
    sys.stderr.writelines(f"{line}\n" for line in found)
    sys.stdout.write(f"{bundle.name}: {bundle.stat().st_size} bytes\n")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
