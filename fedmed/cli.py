"""The command line. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from fedmed import __version__
from fedmed.errors import FedMedError, UsageError

app = typer.Typer(
    name="fedmed",
    help="Multi-hospital imaging studies, federated exactly.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
sites_app = typer.Typer(help="List data sets, or check one before a study.")
app.add_typer(sites_app, name="sites")

QUIET_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
"""No telemetry, no update check, nothing beyond this machine."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON line for programs.")]
StudyFile = Annotated[Path, typer.Argument(help="The study, a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Changes: train.optimizer.lr=0.01 ...")
]


def main() -> None:
    """Run the command line; errors for people are one or two lines."""
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        app()
    except FedMedError as error:
        _fail(error)
    except KeyboardInterrupt:
        typer.echo("\nfedmed: stopped; go on with --resume", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)
    except MemoryError:
        typer.echo("fedmed: not enough memory", err=True)
        sys.exit(1)


def _fail(error: FedMedError) -> None:
    if "--json" in sys.argv:
        record = {
            "error": type(error).__name__,
            "message": error.message,
            "hint": error.hint,
            "exit_code": error.exit_code,
        }
        typer.echo(json.dumps(record))
    else:
        typer.echo(f"fedmed: {error.message}", err=True)
        if error.hint:
            typer.echo(f"  {error.hint}", err=True)
    sys.exit(error.exit_code)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"fedmed {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show it."),
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log what happens inside.")
    ] = False,
) -> None:
    """Multi-hospital imaging studies, federated exactly."""
    del version
    import logging

    level = logging.INFO if verbose else logging.ERROR
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")


@app.command()
def run(
    study: StudyFile,
    overrides: Overrides = None,
    transport: Annotated[
        str | None,
        typer.Option(help="inprocess, ray, flower or deployment."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run.")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="Write report.html.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Run a study: train, evaluate, write the run folder and the report."""
    from fedmed.commands.run import run_command

    run_command(
        study,
        tuple(overrides or ()),
        transport=transport,
        out=out,
        resume=resume,
        report=report,
        as_json=as_json,
    )


@app.command()
def compare(
    study: StudyFile,
    overrides: Overrides = None,
    strategies: Annotated[
        str, typer.Option(help="Names, comma-separated.")
    ] = "separate,joint,fedavg,fedbn",
    seeds: Annotated[str, typer.Option(help="Seeds, comma-separated.")] = "0",
    leave_one_site_out: Annotated[
        bool, typer.Option("--leave-one-site-out", help="Hold out each site in turn.")
    ] = False,
    transport: Annotated[str | None, typer.Option(help="As in run.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the comparison.")] = None,
    as_json: Json = False,
) -> None:
    """Run several strategies on the same study and put them in one table.

    A second call on the same folder goes on where the first one stopped.
    """
    from fedmed.commands.compare import compare_command

    compare_command(
        study,
        tuple(overrides or ()),
        strategies=_words(strategies, "--strategies"),
        seeds=_numbers(seeds),
        leave_one_site_out=leave_one_site_out,
        transport=transport,
        out=out,
        as_json=as_json,
    )


def _words(text: str, option: str) -> tuple[str, ...]:
    words = tuple(word.strip() for word in text.split(",") if word.strip())
    if not words or len(set(words)) != len(words):
        raise UsageError(f"{option} needs distinct, comma-separated names: {text!r}")
    return words


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in _words(text, "--seeds"))
    except ValueError:
        raise UsageError(f"--seeds needs whole numbers: {text!r}") from None


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A run or a comparison.")],
    as_json: Json = False,
) -> None:
    """Write report.html of a run or a comparison, and print its table."""
    from fedmed.commands.report import report_command

    report_command(folder, as_json=as_json)


@app.command()
def strategies(
    name: Annotated[str | None, typer.Argument(help="One method, in full.")] = None,
    as_json: Json = False,
) -> None:
    """List the methods: paper, exchanges, what leaves a site and what stays."""
    from fedmed.commands.strategies import strategies_command

    strategies_command(name, as_json=as_json)


@app.command()
def prove(
    strategy: Annotated[str, typer.Argument(help="Name of a method.")],
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimisation steps.")] = 5,
    as_json: Json = False,
) -> None:
    """Train federated and pooled in float64, and print the largest difference."""
    from fedmed.commands.prove import prove_command

    prove_command(strategy, tuple(overrides or ()), steps=steps, as_json=as_json)


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
    data: Annotated[
        Path | None, typer.Option(help="Folder of your data; may be added later.")
    ] = None,
) -> None:
    """Write a study for your own data, ready to be edited."""
    from fedmed.commands.init import init_command

    init_command(folder, data)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check this machine, and say how to mend what is missing."""
    from fedmed.commands.doctor import doctor_command

    doctor_command(as_json=as_json)


@sites_app.command("list")
def sites_list(as_json: Json = False) -> None:
    """List the data sets that fedmed can read."""
    from fedmed.commands.sites import list_command

    list_command(as_json=as_json)


@sites_app.command("check")
def sites_check(
    name: Annotated[str, typer.Argument(help="Data set, study file or folder.")],
    root: Annotated[Path | None, typer.Option(help="Folder of the data.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="Option of the data set, key=value.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Read every case and say which cannot be used, and why."""
    from fedmed.commands.sites import check_command

    check_command(name, root, tuple(option or ()), as_json=as_json)



