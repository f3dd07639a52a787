"""Run W1, W2 and W3 with fedmed and its peers, beside the bare floor.

`make bench-peers` builds the environments and writes `benchmarks/peers/results.md`. A
repetition of a workload runs floor, half of the rows, floor, the other half; it is a
file under `.bench/peers`: interrupted, the same command goes on with the repetition
where it was. A row that cannot be installed, does not end, or did not average says so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import platform
import signal
import statistics
import sys
from pathlib import Path
from typing import Any

from environments import HERE, PEERS, InstallError, Peer, environment, versions
from processes import RunError, run

LOGGER = logging.getLogger("compare")
ROOT = HERE.parents[1]
ROUNDS = {"W1": 4, "W2": 20, "W3": 6}
QUICK_ROUNDS = {"W1": 2, "W2": 20, "W3": 4}
TITLES = {
    "W1": "training a 2D U-Net, 8 sites",
    "W2": "1,000 sites, 100 sampled, 10,062 parameters",
    "W3": "100 MB of parameters, 8 sites",
}
# How far a final loss may lie from the floor's, in parts of the distance from the floor
# to the nearer of "nothing learned" and "one site trained alone". Only rounding differs
# where sites and batches are the floor's; some draw their own.
TOLERANCE, OWN_TOLERANCE = 0.02, 0.5
# The most that fedmed may take of a peer's time.
BARS = (
    ("W1", "fedmed, bfloat16", "Flower simulation", 1 / 2),
    ("W1", "fedmed, bfloat16", "NVFlare simulator", 1 / 3),
)
FLOOR = "floor"

Run = dict[str, Any]


def fingerprint(workload: str, rounds: int, peers: list[str]) -> str:
    """Of all that the numbers depend on here, so that old ones are not mixed in.

    fedmed's own code is not among it: `--fresh` measures all anew.
    """
    digest = hashlib.sha256(f"{workload} {rounds} {sorted(peers)}".encode())
    shared = [ROOT / "benchmarks" / name for name in ("workload.py", "floor.py")]
    own = sorted(path for path in HERE.rglob("*") if path.suffix in {".py", ".txt"})
    for path in shared + own:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def average_error(
    workload: str, peer: Peer, floor: Run, loss: float, *, is_like_floor: bool
) -> str | None:
    """Why the final loss is not that of an average; None where it is."""
    failures = [floor["loss_untrained"], floor["loss_one"]]
    gap = min(abs(floor["loss"] - failure) for failure in failures)
    draws_own = peer.draws_own or (workload == "W2" and peer.draws_sites)
    is_exact = is_like_floor and not draws_own
    if abs(loss - floor["loss"]) <= (TOLERANCE if is_exact else OWN_TOLERANCE) * gap:
        return None
    return (
        f"did not average: final loss {loss:.4f}, the floor's {floor['loss']:.4f}, "
        f"untrained {failures[0]:.4f}, one site alone {failures[1]:.4f}"
    )


def repetition(
    workload: str, peers: list[Peer], *, rounds: int, folder: Path, timeout_s: float
) -> dict[str, Run]:
    """Run floor, half of the peers, floor, the other half: a run of each by name."""
    tail = [workload, "--rounds", str(rounds)]
    bare = [sys.executable, "-m", "benchmarks.floor", *tail]
    half = -(-len(peers) // 2)
    floor: Run = {}
    found: dict[str, Run] = {}
    for number, peer in enumerate(peers):
        if number in {0, half}:
            LOGGER.info("%s floor", workload)
            again = run(bare, folder, timeout_s)
            floor = again | {"rounds_s": floor.get("rounds_s", []) + again["rounds_s"]}
        LOGGER.info("%s %s", workload, peer.title)
        try:
            python = environment(peer, folder)
            command = [str(python), *peer.command, *tail, *peer.options]
            one = run(command, folder, timeout_s)
            one["versions"] = versions(python, (peer.package, "torch"))
        except (InstallError, RunError) as error:
            one = {"failed": str(error)}
            LOGGER.warning("failed: %s", error)
        found[peer.name] = one
    for peer in peers:
        one = found[peer.name]
        if "failed" not in one and (
            why := average_error(
                workload, peer, floor, one["loss"], is_like_floor=not peer.options
            )
        ):
            one["failed"] = why
    return {FLOOR: floor, **found}


def measure(workload: str, number: int, options: argparse.Namespace) -> None:
    """Do one repetition unless it is there."""
    rounds = (QUICK_ROUNDS if options.quick else ROUNDS)[workload]
    path = file_of(options, workload, number)
    if stored(path, workload, rounds, options.peers) is not None:
        return
    chosen = [p for p in PEERS if p.name in options.peers and p.does(workload)]
    runs = repetition(
        workload,
        chosen,
        rounds=rounds,
        folder=options.folder,
        timeout_s=options.timeout_s,
    )
    content = {
        "fingerprint": fingerprint(workload, rounds, options.peers),
        "runs": runs,
    }
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1))
    partial.replace(path)


def file_of(options: argparse.Namespace, workload: str, number: int) -> Path:
    place: Path = options.folder / ("peers-quick" if options.quick else "peers")
    place.mkdir(parents=True, exist_ok=True)
    return place / f"{workload}-{number}.json"


def stored(
    path: Path, workload: str, rounds: int, peers: list[str]
) -> dict[str, Run] | None:
    """Runs of a repetition by name; None where there is none of this code."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    is_current = content.get("fingerprint") == fingerprint(workload, rounds, peers)
    return content["runs"] if is_current else None


def rows_of(workload: str, repetitions: list[dict[str, Run]]) -> list[dict[str, Any]]:
    """Give a row to the floor and to each peer that was asked."""
    names = dict.fromkeys(name for one in repetitions for name in one)
    titles = {FLOOR: "bare PyTorch: the floor"} | {p.name: p.title for p in PEERS}
    return [
        {"name": titles[name], "workload": workload, **_row(name, repetitions)}
        for name in names
    ]


def _row(name: str, repetitions: list[dict[str, Run]]) -> dict[str, Any]:
    pairs = [(one[name], one[FLOOR]) for one in repetitions if name in one]
    good = [(own, floor) for own, floor in pairs if "failed" not in own]
    reasons = [own["failed"] for own, _ in pairs if "failed" in own]
    if not good:
        return {"ratio": None, "failed": reasons[0]}
    medians = [statistics.median(own["rounds_s"]) for own, _ in good]
    ratios = [
        median / statistics.median(floor["rounds_s"])
        for median, (_, floor) in zip(medians, good, strict=True)
    ]

    def middle(key: str) -> float:
        return statistics.median(own[key] for own, _ in good)

    return {
        "median_s": statistics.median(medians),
        "ratio": statistics.median(ratios),
        "spread": [min(ratios), max(ratios)],
        "repetitions": len(good),
        "start_s": middle("start_s"),
        "peak_rss_bytes": middle("peak_rss_bytes"),
        "loss": middle("loss"),
        "versions": good[-1][0].get("versions", {}),
        "failed_repetitions": reasons,
    }


def table(workload: str, rows: list[dict[str, Any]]) -> str:
    """The rows of one workload; failures are named below them."""
    lines = [
        f"## {workload}: {TITLES[workload]}",
        "",
        "| | round | of the floor [range] | n | start | memory | final loss |",
        "|---|---|---|---|---|---|---|",
    ]
    notes = []
    for one in rows:
        if one["ratio"] is None:
            lines.append(f"| {one['name']} | none | | 0 | | | |")
            notes.append(f"* {one['name']}: {one['failed']}")
            continue
        low, high = one["spread"]
        cells = (
            f"{one['median_s']:.3g} s",
            f"{one['ratio']:.2f} [{low:.2f}-{high:.2f}]",
            str(one["repetitions"]),
            f"{one['start_s']:.1f} s",
            f"{one['peak_rss_bytes'] / 1e9:.1f} GB",
            f"{one['loss']:.4f}",
        )
        lines.append(f"| {one['name']} | {' | '.join(cells)} |")
        notes += [
            f"* {one['name']}, one repetition: {reason}"
            for reason in one["failed_repetitions"]
        ]
    return "\n".join([*lines, "", *notes, ""])


def statements(rows: list[dict[str, Any]]) -> list[str]:
    """Whether fedmed takes at most so much of a peer's time."""
    ratios = {(row["workload"], row["name"]): row["ratio"] for row in rows}
    told = []
    for workload, ours, beginning, bar in BARS:
        own = ratios.get((workload, ours))
        other = next(
            (r for (w, n), r in ratios.items() if w == workload and beginning in n),
            None,
        )
        what = f"* {workload}, {ours}, at most {bar:.2f} of {beginning}"
        if not own or not other:
            told.append(f"{what}: not measured")
            continue
        word = "held" if own <= bar * other else "**not held**"
        told.append(f"{what}: {word}, {own / other:.2f}")
    return told


def page(options: argparse.Namespace) -> str:
    """Everything that is stored."""
    rows: list[dict[str, Any]] = []
    tables = []
    for workload in ROUNDS:
        rounds = (QUICK_ROUNDS if options.quick else ROUNDS)[workload]
        files = [
            file_of(options, workload, number) for number in range(options.repetitions)
        ]
        found = [
            runs
            for file in files
            if (runs := stored(file, workload, rounds, options.peers))
        ]
        if found:
            own = rows_of(workload, found)
            rows += own
            tables.append(table(workload, own))
    used = sorted(
        {f"{p} {v}" for row in rows for p, v in row.get("versions", {}).items()}
    )
    (options.folder / "peers.json").write_text(json.dumps(rows, indent=1) + "\n")
    return "\n".join(
        [
            "# fedmed and other frameworks on the same work",
            "",
            "Written by `make bench-peers`; do not edit. [README.md](README.md) says "
            "what is compared. Ratios are taken within a repetition; the floor is "
            "[`benchmarks/floor.py`](../floor.py), that of `make bench`.",
            "",
            *(["**Measured with `--quick`: nothing to be quoted.**", ""]
              if options.quick else []),
            f"* Machine: {processor()}, {os.cpu_count()} cores",
            f"* Versions: {', '.join(used)}",
            *statements(rows),
            "",
            *tables,
        ]
    )  # fmt: skip


def processor() -> str:
    """Name of the processor."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    named = [line for line in lines if line.startswith("model name")]
    return named[0].partition(":")[2].strip() if named else platform.machine()


def write(options: argparse.Namespace) -> None:
    text = page(options)
    out = options.folder / "peers-quick.md" if options.quick else HERE / "results.md"
    (options.out or out).write_text(text)


def main() -> None:
    signal.signal(signal.SIGTERM, stop)
    options = arguments()
    options.folder = options.folder.resolve()
    options.repetitions = 1 if options.quick else options.repetitions
    if options.fresh:
        for workload in options.workloads:
            for number in range(options.repetitions):
                file_of(options, workload, number).unlink(missing_ok=True)
    for number in range(options.repetitions):
        for workload in options.workloads:
            LOGGER.info("%s, repetition %d", workload, number + 1)
            measure(workload, number, options)
            write(options)
    print(page(options))


def stop(*_: object) -> None:
    """Leave by an exception, so that the simulation that runs is ended, too."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    LOGGER.warning("asked to stop: what was measured is kept")
    sys.exit(143)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = [peer.name for peer in PEERS]
    parser.add_argument("--peers", nargs="+", choices=names, default=names)
    parser.add_argument(
        "--workloads", nargs="+", choices=list(ROUNDS), default=list(ROUNDS)
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--timeout-s", type=float, default=600.0, help="of one run")
    parser.add_argument("--quick", action="store_true", help="once, few rounds")
    parser.add_argument("--fresh", action="store_true", help="measure all anew")
    parser.add_argument("--out", type=Path, help="the page")
    parser.add_argument("--folder", type=Path, default=ROOT / ".bench")
    return parser.parse_args()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main()
