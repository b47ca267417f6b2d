"""Command line: one subcommand a stage."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

if TYPE_CHECKING:
    from fisherprint.experiment import Experiment

# Of this process, nearly: loading the libraries takes seconds.
_BEGAN = time.monotonic()

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

_Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")]
_Out = Annotated[Path, typer.Option("--output", "-o", metavar="RUN", help="Run folder to write.")]
_ExperimentFile = Annotated[Path, typer.Argument(metavar="EXPERIMENT.toml")]
_Data = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder of the files that the experiment names."),
]
_Workers = Annotated[int | None, typer.Option(metavar="N", help="Local threads; else all cores.")]
_Scheduler = Annotated[
    str | None,
    typer.Option(metavar="tcp://HOST:PORT", help="Dask scheduler."),
]
_Force = Annotated[bool, typer.Option("--force", help="Replace earlier results.")]


class _Rate(ProgressColumn):
    """Steps per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.3g}/s", style="progress.data.speed")


class _Display:
    """Progress bars with rate and remaining time on a terminal; a line now and then elsewhere."""

    # Without a terminal, a line every so many seconds.
    _EVERY = 15.0

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}
        self._printed: dict[str, float] = {}
        self._began: dict[str, tuple[float, int]] = {}

    def say(self, line: str) -> None:
        self._bars.console.print(line, markup=False, highlight=False)

    def progress(self, what: str, done: int, total: int) -> None:
        if self._bars.console.is_terminal:
            if what not in self._tasks:
                self._tasks[what] = self._bars.add_task(what, total=total, completed=done)
            self._bars.update(self._tasks[what], completed=done, total=total)
            return
        now = time.monotonic()
        began, first = self._began.setdefault(what, (now, done))
        if done < total and now - self._printed.get(what, -self._EVERY) < self._EVERY:
            return
        self._printed[what] = now
        rate = (done - first) / (now - began) if now > began else 0.0
        left = f", {rate:.3g}/s, {(total - done) / rate:.0f} s left" if rate > 0 else ""
        self.say(f"  {what}: {done} of {total}{left}")


@contextmanager
def _display() -> Iterator[_Display]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(soft_wrap=True)) as bars:
        yield _Display(bars)


@app.callback()
def _main(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback on errors.")] = False,
) -> None:
    """From a pulse train to parameter maps, in units of the Cramér-Rao bound.

    Example: fisherprint run experiments/bundled.toml -o runs/bundled
    """
    # `main` takes --debug out of the arguments, wherever it stands; here it is only listed.


@app.command()
def simulate(
    experiment: _ExperimentFile,
    output: _Out,
    data: _Data = None,
    workers: _Workers = None,
    scheduler: _Scheduler = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it takes.")] = False,
    force: _Force = False,
) -> None:
    """Simulate a data set: coefficients and bounds. Killed and repeated, it goes on.

    Example: fisherprint simulate experiments/bundled.toml -o runs/bundled
    """
    from fisherprint import experiment as stages

    wanted = stages.read(experiment, data=data)
    if dry_run:
        with stages.workers(workers, scheduler) as pool:
            lines = stages.forecast_run(
                stages.Run(output, wanted),
                executor=pool.executor,
                n_workers=pool.number,
                start=time.monotonic() - _BEGAN,
            )
            typer.echo("\n".join(lines))
        return
    run = stages.start(wanted, output, force=force)
    stages.require_absent(run.dataset)
    with stages.workers(workers, scheduler) as pool, _display() as display:
        stages.simulate_run(run, executor=pool.executor, progress=display.progress)
        display.say(f"data set: {run.dataset}")


@app.command()
def train(
    run: _Run,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after the last finished epoch.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Forget earlier epochs.")] = False,
) -> None:
    """Train the network of a run; Ctrl-C keeps all finished epochs.

    Example: fisherprint train runs/bundled --resume
    """
    from fisherprint import experiment as stages

    with _display() as display:
        opened = stages.open_run(run)
        stages.train_run(
            opened, resume=resume, force=force, say=display.say, progress=display.progress
        )
        display.say(f"network: {opened.network}")


@app.command()
def evaluate(run: _Run, force: _Force = False) -> None:
    """Bias, variance and loss of a run's network on its test set, by SNR.

    Example: fisherprint evaluate runs/bundled
    """
    from fisherprint import experiment as stages

    opened = stages.open_run(run)
    if not force:
        stages.require_absent(opened.audit)
    with _display() as display:
        stages.evaluate_run(opened, say=display.say, progress=display.progress)


@app.command(name="map")
def map_(
    coefficients: Annotated[Path, typer.Argument(metavar="COEFFICIENTS")],
    run: Annotated[Path, typer.Option(metavar="RUN", help="Run folder with the network.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Folder of maps.")],
    key: Annotated[str | None, typer.Option(help="Name of the images in .mat and .h5.")] = None,
    mask: Annotated[Path | None, typer.Option(help="Mask; else automatic.")] = None,
    mask_key: Annotated[
        str | None, typer.Option(help="Its name in MASK, else in COEFFICIENTS.")
    ] = None,
    basis: Annotated[
        Path | None, typer.Option(help="Basis of the images, to be compared.")
    ] = None,
    basis_key: Annotated[str | None, typer.Option(help="Its name in the file.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Map images of another basis all the same.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace maps that are there.")
    ] = False,
) -> None:
    """Map coefficient images (.nii, .cfl, .npy, .mat, .h5) with a run's network.

    Example: fisherprint map coeffs.mat --key x --mask-key mask --run runs/invivo -o maps
    """
    from fisherprint import experiment as stages

    if (basis is None) != (basis_key is None):
        raise typer.BadParameter("--basis and --basis-key belong together; got one of them.")
    section = stages.MapSection(
        coefficients=coefficients,
        key=key,
        mask=mask,
        mask_key=mask_key,
        basis=basis,
        basis_key=basis_key,
    )
    with _display() as display:
        stages.map_run(
            stages.open_run(run),
            section,
            output,
            force=force,
            overwrite=overwrite,
            say=display.say,
            progress=display.progress,
        )
        display.say(f"maps: {output}")


@app.command()
def report(run: _Run) -> None:
    """Write a run's report, one page that needs nothing else.

    Example: fisherprint report runs/bundled
    """
    from fisherprint import experiment as stages

    typer.echo(f"report: {stages.report_run(stages.open_run(run))}")


@app.command(name="run")
def run_(
    experiment: _ExperimentFile,
    output: _Out,
    data: _Data = None,
    workers: _Workers = None,
    scheduler: _Scheduler = None,
    force: _Force = False,
) -> None:
    """All stages of an experiment, skipping those already done.

    Example: fisherprint run experiments/invivo.toml -o runs/invivo
    """
    from fisherprint import experiment as stages

    _run_all(stages.read(experiment, data=data), output, force, workers, scheduler)


@app.command()
def demo(output: _Out = Path("runs/demo"), force: _Force = False) -> None:
    """Simulate, train, evaluate and map a digital brain; needs no data.

    Example: fisherprint demo -o runs/demo
    """
    from fisherprint import experiment as stages

    _run_all(stages.read(None), output, force)


def _run_all(
    wanted: Experiment,
    output: Path,
    force: bool,
    workers: int | None = None,
    scheduler: str | None = None,
) -> None:
    from fisherprint import experiment as stages

    began = time.monotonic()
    run = stages.start(wanted, output, force=force)
    with stages.workers(workers, scheduler) as pool, _display() as display:
        page = stages.run_all(
            run, executor=pool.executor, say=display.say, progress=display.progress
        )
        display.say(f"finished in {(time.monotonic() - began) / 60:.1f} minutes")
        display.say(f"report: {page.resolve()}")


def main() -> None:
    """Run the command line: exit code 0, 2 (wrong call or bad input) or 130 (interrupted)."""
    arguments = [word for word in sys.argv[1:] if word != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        app(args=arguments, prog_name="fisherprint")
    except KeyboardInterrupt:
        _leave_interrupted()
    except SystemExit as leaving:
        # What typer makes of a KeyboardInterrupt.
        if leaving.code != 130:
            raise
        _leave_interrupted()
    except (ValueError, KeyError, OSError, ArithmeticError, ImportError) as error:
        if debug:
            raise
        # A KeyError shows its message as a literal.
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def _leave_interrupted() -> NoReturn:
    print("interrupted; finished shards, epochs and stages are kept", file=sys.stderr)
    # Leave at once: threads of compiled code may still be busy.
    sys.stderr.flush()
    os._exit(130)


if __name__ == "__main__":
    main()
