"""Run W1, W2 and W3 with the peers, each beside the bare floor, and write the ratios.

`python benchmarks/peers/compare.py` builds the environments, runs floor and peer in
turn, and keeps every pair under `.bench/results`: interrupted, it goes on where it was.
A peer that cannot be installed, does not end, or did not average is a row that says so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import signal
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from environments import HERE, PEERS, InstallError, Peer, environment, versions
from processes import RunError, run

LOGGER = logging.getLogger("compare")
ROUNDS = {"W1": 5, "W2": 12, "W3": 8}
# How far a final loss may lie from the floor's, in parts of the distance from the floor
# to the nearer of "nothing learned" and "one site trained alone". Where all sites take
# part, only rounding differs; in W2 the frameworks draw different sites.
TOLERANCE = {"W1": 0.02, "W2": 0.25, "W3": 0.02}

Pair = dict[str, Any]


def fingerprint(peer: Peer, workload: str) -> str:
    """Of everything a pair's numbers depend on, so that old pairs are not mixed in."""
    shared = [
        HERE / name
        for name in ("workload.py", "floor.py", "processes.py", "compare.py")
    ]
    own = sorted(p for p in (HERE / peer.name).iterdir() if p.is_file())
    digest = hashlib.sha256(f"{workload} {ROUNDS[workload]}".encode())
    for path in shared + own:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def average_error(workload: str, floor: dict[str, Any], loss: float) -> str | None:
    """Why the final loss is not that of an average; None where it is."""
    failures = [floor["loss_untrained"], floor["loss_one"]]
    gap = min(abs(floor["loss"] - failure) for failure in failures)
    if abs(loss - floor["loss"]) <= TOLERANCE[workload] * gap:
        return None
    return (
        f"did not average: final loss {loss:.4f}, the floor's {floor['loss']:.4f}, "
        f"untrained {failures[0]:.4f}, one site alone {failures[1]:.4f}"
    )


def measure(
    peer: Peer, workload: str, *, python: Path, folder: Path, timeout_s: float
) -> Pair:
    """Run floor, peer, floor, in the peer's own environment.

    The floor's rounds of before and after count together, so that a machine that gets
    busier or idler meanwhile moves both sides of the ratio.
    """
    tail = [workload, "--rounds", str(ROUNDS[workload])]
    floor = [str(python), str(HERE / "floor.py"), *tail]
    command = [str(python), *peer.launcher, str(peer.script), *tail]
    try:
        base = run(floor, folder, timeout_s)
    except RunError as error:
        return {"failed": f"the floor itself: {error}"}
    try:
        result = run(command, folder, timeout_s)
    except RunError as error:
        return {"floor": base, "failed": str(error)}
    try:
        base["rounds_s"] += run(floor, folder, timeout_s)["rounds_s"]
    except RunError as error:
        return {"failed": f"the floor itself: {error}"}
    pair: Pair = {"floor": base, "peer": result}
    reason = average_error(workload, base, result["loss"])
    return pair | ({"failed": reason} if reason else {})


def pairs_of(
    peer: Peer, workload: str, *, folder: Path, repetitions: int
) -> Iterator[tuple[Path, Pair | None]]:
    """The files of a peer's repetitions, with what they hold already."""
    current = fingerprint(peer, workload)
    for repetition in range(repetitions):
        path = folder / "results" / f"{peer.name}-{workload}-{repetition}.json"
        pair = json.loads(path.read_text()) if path.exists() else None
        yield path, pair if pair and pair["fingerprint"] == current else None


def complete(
    peer: Peer, workload: str, path: Path, *, folder: Path, timeout_s: float
) -> None:
    """Make one pair and keep it; a failure is kept as such."""
    LOGGER.info("%s", path.stem)
    try:
        python = environment(peer, folder)
        pair = measure(
            peer, workload, python=python, folder=folder, timeout_s=timeout_s
        )
        pair["versions"] = versions(python, (peer.package, "torch"))
    except InstallError as error:
        pair = {"failed": str(error)}
    if "failed" in pair:
        LOGGER.warning("%s failed: %s", path.stem, pair["failed"])
    pair["fingerprint"] = fingerprint(peer, workload)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(pair, indent=1))
    partial.replace(path)


def row(peer: Peer, workload: str, pairs: list[Pair]) -> dict[str, Any]:
    """One row: the median round, its ratio to the floor, the ratios' range."""
    named: dict[str, Any] = {"name": peer.title, "workload": workload}
    reasons = [pair["failed"] for pair in pairs if "failed" in pair]
    good = [pair for pair in pairs if "failed" not in pair]
    if not good:
        empty = dict.fromkeys(("median_s", "spread", "ratio"))
        return named | empty | {"failed": reasons[0] if reasons else "not run"}

    def middle(side: str, key: str) -> float:
        values = [pair[side][key] for pair in good]
        flat = [v for one in values for v in (one if isinstance(one, list) else [one])]
        return statistics.median(flat)

    ratios = [
        statistics.median(pair["peer"]["rounds_s"])
        / statistics.median(pair["floor"]["rounds_s"])
        for pair in good
    ]
    result = named | {
        "median_s": middle("peer", "rounds_s"),
        "spread": [min(ratios), max(ratios)],
        "ratio": statistics.median(ratios),
        "repetitions": len(good),
        "floor_median_s": middle("floor", "rounds_s"),
        "start_s": middle("peer", "start_s"),
        "floor_start_s": middle("floor", "start_s"),
        "peak_rss_bytes": middle("peer", "peak_rss_bytes"),
        "floor_peak_rss_bytes": middle("floor", "peak_rss_bytes"),
        "loss": middle("peer", "loss"),
        "floor_loss": middle("floor", "loss"),
        "versions": good[-1]["versions"],
    }
    if reasons:
        result["failed_repetitions"] = reasons
    return result


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table; failures are named below it."""
    lines = [
        "| | work | round | of the floor [range] | n | start | memory | final loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for one in rows:
        label = f"| {one['name']} | {one['workload']} |"
        if one["ratio"] is None:
            lines.append(f"{label} none | | 0 | | | |")
            notes.append(f"* {one['name']}, {one['workload']}: {one['failed']}")
            continue
        low, high = one["spread"]
        cells = (
            f"{one['median_s']:.3g} s",
            f"{one['ratio']:.2f} [{low:.2f}-{high:.2f}]",
            str(one["repetitions"]),
            f"{one['start_s']:.1f} s (floor {one['floor_start_s']:.1f})",
            f"{one['peak_rss_bytes'] / 1e9:.1f} GB "
            f"(floor {one['floor_peak_rss_bytes'] / 1e9:.1f})",
            f"{one['loss']:.4f} (floor {one['floor_loss']:.4f})",
        )
        lines.append(f"{label} {' | '.join(cells)} |")
        notes += [
            f"* {one['name']}, {one['workload']}, one repetition: {reason}"
            for reason in one.get("failed_repetitions", [])
        ]
    found = {
        f"{package} {version}"
        for one in rows
        for package, version in one.get("versions", {}).items()
    }
    notes.append(f"* {', '.join(sorted(found)) or 'nothing installed'}")
    return "\n".join([*lines, "", *notes]) + "\n"


def write(folder: Path, repetitions: int) -> None:
    """Write all rows, those that this call did not ask for among them."""
    rows = []
    for workload in ROUNDS:
        for peer in PEERS:
            found = pairs_of(peer, workload, folder=folder, repetitions=repetitions)
            rows.append(row(peer, workload, [pair for _, pair in found if pair]))
    document = json.dumps({"name": "peers", "rows": rows}, indent=1)
    (folder / "peers.json").write_text(document + "\n")
    (folder / "peers.md").write_text(markdown(rows))


def main() -> None:
    signal.signal(signal.SIGTERM, stop)
    options = arguments()
    folder: Path = options.folder.resolve()
    (folder / "results").mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n")
    peers = [peer for peer in PEERS if peer.name in options.peers]
    chosen = [(peer, workload) for workload in options.workloads for peer in peers]
    for repetition in range(options.repetitions):
        for peer, workload in chosen:
            files = list(
                pairs_of(peer, workload, folder=folder, repetitions=options.repetitions)
            )
            path, pair = files[repetition]
            failed = any(p and "failed" in p for _, p in files[:repetition])
            again = options.retry_failed and pair is not None and "failed" in pair
            if again or (pair is None and not failed):
                complete(
                    peer, workload, path, folder=folder, timeout_s=options.timeout_s
                )
            write(folder, options.repetitions)
    LOGGER.info("wrote peers.json and peers.md\n%s", (folder / "peers.md").read_text())


def stop(*_: object) -> None:
    """Leave by an exception, so that the simulation that runs is ended, too."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    LOGGER.warning("asked to stop: what was measured is kept")
    sys.exit(143)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    names = [peer.name for peer in PEERS]
    parser.add_argument("--peers", nargs="+", choices=names, default=names)
    parser.add_argument(
        "--workloads", nargs="+", choices=list(ROUNDS), default=list(ROUNDS)
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--timeout-s", type=float, default=900.0, help="of one run")
    parser.add_argument("--retry-failed", action="store_true")
    parser.add_argument("--folder", type=Path, default=HERE.parents[1] / ".bench")
    return parser.parse_args()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main()
