"""What all commands share: the program, its options, progress on the screen."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    from fisherprint.experiment import Question, Run, Trained
    from fisherprint.sequence import PulseTrain

# Of this process, nearly: loading the libraries takes seconds.
BEGAN = time.monotonic()

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")]
OutputRun = Annotated[
    Path, typer.Option("--output", "-o", metavar="RUN", help="Run folder to write.")
]
ExperimentFile = Annotated[Path, typer.Argument(metavar="EXPERIMENT.toml")]
DataFolder = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder of the files that the experiment names."),
]
Workers = Annotated[int | None, typer.Option(metavar="N", help="Local threads; else all cores.")]
Scheduler = Annotated[
    str | None,
    typer.Option(metavar="tcp://HOST:PORT", help="Dask scheduler."),
]
# Shown by `convert`: the helps of `map` and `fit` fill a screen.
Units = Annotated[list[str] | None, typer.Option("--as", metavar="NAME=UNIT", hidden=True)]
Force = Annotated[bool, typer.Option("--force", help="Replace earlier results.")]
RepetitionTime = Annotated[
    float | None, typer.Option(metavar="MS", help="Repetition time in ms; .mat has none.")
]
ParameterNames = Annotated[
    list[str] | None,
    typer.Option(metavar="NAMES", help="Of the model, such as T1,T2,B0,B1."),
]
Snr = Annotated[float | None, typer.Option(metavar="SNR", help="|M0|/σ of one cycle; else 50.")]
ScanTime = Annotated[
    float | None, typer.Option(metavar="S", help="Scan time in s; else one cycle.")
]


class _Rate(ProgressColumn):
    """Steps per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.3g}/s", style="progress.data.speed")


class Display:
    """Progress bars with rate and remaining time on a terminal; a line now and then elsewhere."""

    # Without a terminal, a line every so many seconds.
    _EVERY = 15.0

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}
        self._printed: dict[str, float] = {}
        self._began: dict[str, tuple[float, int]] = {}

    def say(self, line: str) -> None:
        """Print a line, above the bars if there are any."""
        self._bars.console.print(line, markup=False, highlight=False)

    def progress(self, what: str, done: int, total: int) -> None:
        """Show how much of something is done."""
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
def shown(*, quiet: bool = False) -> Iterator[Display]:
    """The display of one command; a quiet one shows nothing."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(soft_wrap=True, quiet=quiet)) as bars:
        yield Display(bars)


@app.callback()
def _main(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback on errors.")] = False,
) -> None:
    """From a pulse train to parameter maps, in units of the Cramér-Rao bound.

    Example: fisherprint run experiments/bundled.toml -o runs/bundled
    """
    # `main` takes --debug out of the arguments, wherever it stands; here it is only listed.
    if "TORCHELASTIC_RUN_ID" in os.environ and context.invoked_subcommand != "train":
        raise typer.BadParameter(
            f"torchrun is for train alone; got {context.invoked_subcommand}, which would write "
            "the same files in each process. Call it without torchrun."
        )


def source_of(run: Path | None, model: str | None, option: str = "--run") -> Run | Trained:
    """A run, or a shipped network."""
    from fisherprint import experiment as stages

    if run is not None and model is None:
        return stages.open_run(run)
    if model is not None and run is None:
        return stages.shipped.load(model)
    raise typer.BadParameter(f"expected {option} or --model; got both or neither. Name one.")


def named(words: Sequence[str], form: str = "NAME=UNIT") -> dict[str, str]:
    """What stands behind each name."""
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals and value) or name in found:
            raise typer.BadParameter(f"expected {form}, once a name; got {word!r}.")
        found[name] = value
    return found


def read_trains(paths: Sequence[Path], milliseconds: float | None) -> dict[str, PulseTrain]:
    """Trains by their labels; a repetition time in ms for the files that have none."""
    from fisherprint import experiment as stages

    # 4.1 ms are 4.1e-3 s; 4.1 * 1e-3 and 4.1 / 1e3 are the number beside it.
    time = None if milliseconds is None else float(Decimal(repr(milliseconds)).scaleb(-3))
    return stages.read_trains(paths, repetition_time=time)


def question_of(**options: Any) -> Question:
    """What is asked by the options that were given; several names may stand with commas."""
    from fisherprint import experiment as stages

    given = {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        if isinstance(value, list):
            parts = [v.split(",") if isinstance(v, str) else [v] for v in value]
            given[name] = tuple(p.strip() if isinstance(p, str) else p for ps in parts for p in ps)
    return stages.Question(**given)
