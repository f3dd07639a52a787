"""The command line. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Annotated, NoReturn

import click
import typer

from fedmed import __version__
from fedmed.errors import FedMedError, StorageError, UsageError

logger = logging.getLogger(__name__)

app = typer.Typer(
    name="fedmed",
    help="Multi-hospital imaging studies, federated exactly.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # or --help imports rich, at twice the time
    context_settings={"help_option_names": ["-h", "--help"]},
)
sites_app = typer.Typer(
    help="List data sets, or check one before a study.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(sites_app, name="sites")

QUIET_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
"""No telemetry, no update check, nothing beyond this machine."""

OUR_PACKAGES = frozenset({"fedmed", "sites", "strategies"})

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON line for programs.")]
StudyFile = Annotated[Path, typer.Argument(help="The study, a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Changes: train.optimizer.lr=0.01 ...")
]


def main() -> None:
    """Run the command line; errors for people are one or two lines."""
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that knows ASCII only
    try:
        code = app(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        typer.echo(error.format_message())
        sys.exit(UsageError.exit_code)
    except click.ClickException as error:
        _fail(_usage_error(error))
    except (KeyboardInterrupt, click.Abort):
        code = INTERRUPTED
    except Exception as error:
        _fail(error if isinstance(error, FedMedError) else _unforeseen(error))
    if code == INTERRUPTED:
        typer.echo("\nfedmed: stopped", err=True)
    sys.exit(code if isinstance(code, int) else 0)


def _usage_error(error: click.ClickException) -> UsageError:
    """Put what is wrong on the command line into our words."""
    told = error.format_message().removesuffix(".")
    told = re.sub(r"( Did you mean [^?]*\?)\1", r"\1", told)  # typer and click ask both
    context = getattr(error, "ctx", None)
    command = "fedmed" if context is None else context.command_path
    return UsageError(told[:1].lower() + told[1:], hint=f"See {command} --help.")


def _unforeseen(error: Exception) -> FedMedError:
    """Describe an error that nobody wrote for people.

    Its own text stays out: it may name a patient's file.
    """
    logger.info("unforeseen", exc_info=error)
    if isinstance(error, MemoryError):
        return FedMedError(
            "not enough memory",
            hint="Lower train.batch_size, the network's size or preprocess.size.",
        )
    if isinstance(error, OSError):
        name = Path(str(error.filename or "a file")).name
        told = error.strerror or type(error).__name__
        return StorageError(f"{name}: {told}")
    return FedMedError(
        f"this should not happen: {type(error).__name__} {_place(error)}",
        hint="Please report it with what `fedmed --verbose ...` prints.",
    )


def _place(error: Exception) -> str:
    """Name the innermost line of ours that an exception passed through."""
    place, trace = "outside fedmed", error.__traceback__
    while trace is not None:
        module = str(trace.tb_frame.f_globals.get("__name__", ""))
        if module.partition(".")[0] in OUR_PACKAGES:
            place = f"in {module}, line {trace.tb_lineno}"
        trace = trace.tb_next
    return place


def _fail(error: FedMedError) -> NoReturn:
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


def _is_ours(record: logging.LogRecord) -> bool:
    """Other packages' words were not written for people, and may name a patient."""
    return record.name.partition(".")[0] in OUR_PACKAGES


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
    set_up_logging(verbose)


def set_up_logging(verbose: bool) -> None:
    """Let a process tell people of our errors, or programmers of everything."""
    if verbose:
        form = "%(levelname)s %(name)s: %(message)s"
        logging.basicConfig(level=logging.INFO, format=form)
        return
    logging.basicConfig(level=logging.ERROR, format="fedmed: %(message)s")
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_ours)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # of other packages, for their callers


@app.command()
def run(  # noqa: PLR0917
    study: StudyFile,
    overrides: Overrides = None,
    transport: Annotated[
        str | None,
        typer.Option(help="inprocess, workers, ray, flower or deployment."),
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
def compare(  # noqa: PLR0917
    study: StudyFile,
    overrides: Overrides = None,
    strategies: Annotated[
        str,
        typer.Option(help="Names, comma-separated; options as ms_net[sync=round]."),
    ] = "separate,joint,fedavg,fedbn",
    seeds: Annotated[str, typer.Option(help="Seeds, comma-separated.")] = "0",
    protocol: Annotated[
        str,
        typer.Option(
            help="Who trains and who is tested: within_site, leave_one_site_out, or "
            "cross_site (each site trains alone, all are tested)."
        ),
    ] = "",
    leave_one_site_out: Annotated[
        bool,
        typer.Option("--leave-one-site-out", help="--protocol leave_one_site_out."),
    ] = False,
    jobs: Annotated[
        int, typer.Option(min=1, help="Runs side by side, each in its own process.")
    ] = 1,
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
        protocol=protocol,
        leave_one_site_out=leave_one_site_out,
        jobs=jobs,
        transport=transport,
        out=out,
        as_json=as_json,
    )


def _words(text: str, option: str) -> tuple[str, ...]:
    from fedmed.legs import split_words

    words = split_words(text)
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
