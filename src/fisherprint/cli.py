"""Command line: one subcommand a stage."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich import box
from rich.console import Console
from rich.measure import Measurement
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
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from fisherprint.bounds import BoundTable
    from fisherprint.experiment import Experiment, Question, Run, Trained
    from fisherprint.sequence import PulseTrain

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
# Shown by `convert`: the helps of `map` and `fit` fill a screen.
_As = Annotated[list[str] | None, typer.Option("--as", metavar="NAME=UNIT", hidden=True)]
_Force = Annotated[bool, typer.Option("--force", help="Replace earlier results.")]
_RepetitionTime = Annotated[
    float | None, typer.Option(metavar="MS", help="Repetition time in ms; .mat has none.")
]
_Parameters = Annotated[
    list[str] | None,
    typer.Option(metavar="NAMES", help="Of the model, such as T1,T2,B0,B1."),
]
_Snr = Annotated[float | None, typer.Option(metavar="SNR", help="|M0|/σ of one cycle; else 50.")]
_ScanTime = Annotated[
    float | None, typer.Option(metavar="S", help="Scan time in s; else one cycle.")
]


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
def _display(*, quiet: bool = False) -> Iterator[_Display]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(soft_wrap=True, quiet=quiet)) as bars:
        yield _Display(bars)


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

    Several GPUs: torchrun --nproc-per-node N -m fisherprint.cli train RUN

    Example: fisherprint train runs/bundled --resume
    """
    from fisherprint import experiment as stages
    from fisherprint import train as training

    with training.together() as ranks, _display(quiet=ranks.rank > 0) as display:
        opened = stages.open_run(run)
        stages.train_run(
            opened,
            resume=resume,
            force=force,
            ranks=ranks,
            say=display.say,
            progress=display.progress,
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


# Options enough for a screen: two lines of help are one paragraph.
@app.command(
    name="map",
    help="Map coefficient images (.nii, .cfl, .npy, .mat, .h5) with a trained network.\n"
    "Example: fisherprint map coeffs.mat --key x --run runs/invivo -o maps",
)
def map_(
    coefficients: Annotated[Path, typer.Argument(metavar="COEFFICIENTS")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Folder of maps.")],
    run: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Run folder with the network,")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="or a shipped one: fisherprint models.")
    ] = None,
    key: Annotated[str | None, typer.Option(help="Name of the images in .mat and .h5.")] = None,
    mask: Annotated[
        Path | None, typer.Option(help="Mask, or --mask-key NAME; else automatic.")
    ] = None,
    # Help fits a screen: keys stand beside their files, --precision in docs/decisions/027,
    # --no-errors in 040.
    mask_key: Annotated[str | None, typer.Option(hidden=True)] = None,
    basis: Annotated[
        Path | None, typer.Option(help="Basis of the images, with --basis-key NAME.")
    ] = None,
    basis_key: Annotated[str | None, typer.Option(hidden=True)] = None,
    noise_std: Annotated[
        float | None,
        typer.Option(help="σ of Re, Im; else the background's."),
    ] = None,
    precision: Annotated[str | None, typer.Option(hidden=True)] = None,
    no_errors: Annotated[bool, typer.Option("--no-errors", hidden=True)] = False,
    known: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="Known map; B0 in rad/s, B1 relative."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Map images of another basis all the same.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace maps that are there.")
    ] = False,
    stated: _As = None,
) -> None:
    """Map coefficient images with a trained network."""
    from fisherprint import experiment as stages

    if (basis is None) != (basis_key is None):
        raise typer.BadParameter("--basis and --basis-key belong together; got one of them.")
    source = _source(run, model)
    section = stages.MapSection(
        coefficients=coefficients,
        key=key,
        mask=mask,
        mask_key=mask_key,
        basis=basis,
        basis_key=basis_key,
        noise_std=noise_std,
        precision=precision,
        errors=not no_errors,
        known=_known_maps(known or []),
    )
    with _display() as display:
        stages.map_run(
            source,
            section,
            output,
            force=force,
            overwrite=overwrite,
            stated=_stated(stated or ()),
            say=display.say,
            progress=display.progress,
        )
        display.say(f"maps: {output}")


# As for `crb` below.
@app.command(
    help="Fit coefficient images by least squares. Killed and repeated, it goes on.\n"
    "Example: fisherprint fit x.nii --run runs/paper -o nlls --known B1=b1.nii"
)
def fit(
    coefficients: Annotated[Path, typer.Argument(metavar="COEFFICIENTS")],
    run: Annotated[Path, typer.Option(metavar="RUN", help="Run folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Folder of maps.")],
    key: Annotated[str | None, typer.Option(help="Name of the images in .mat and .h5.")] = None,
    # As in `map`: keys stand beside their files.
    mask: Annotated[Path | None, typer.Option(help="Or --mask-key NAME; else automatic.")] = None,
    mask_key: Annotated[str | None, typer.Option(hidden=True)] = None,
    known: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE|MAP", help="Not fitted; repeated.")
    ] = None,
    start: Annotated[
        str | None, typer.Option(metavar="N|MAPS|RUN", help="Else RUN's network, or 4 starts.")
    ] = None,
    noise_std: Annotated[
        float | None, typer.Option(help="σ of Re, Im; else the residual's.")
    ] = None,
    workers: _Workers = None,
    scheduler: _Scheduler = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it takes.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace maps that are there.")
    ] = False,
    stated: _As = None,
) -> None:
    """Fit coefficient images by least squares."""
    from fisherprint import experiment as stages

    section = stages.MapSection(
        coefficients=coefficients, key=key, mask=mask, mask_key=mask_key, noise_std=noise_std
    )
    with stages.workers(workers, scheduler) as pool, _display() as display:
        stages.fit_run(
            stages.open_run(run),
            section,
            output,
            known=dict(_fixed(word) for word in known or ()),
            start=None if start is None else int(start) if start.isdigit() else Path(start),
            overwrite=overwrite,
            stated=_stated(stated or ()),
            executor=pool.executor,
            n_workers=pool.number,
            dry_run=dry_run,
            say=display.say,
            progress=display.progress,
        )
        if not dry_run:
            display.say(f"maps: {output}")


def _fixed(word: str) -> tuple[str, float | Path]:
    """NAME=VALUE or NAME=FILE."""
    name, equals, value = word.partition("=")
    if not (name and equals and value):
        raise typer.BadParameter(f"--known takes NAME=VALUE or NAME=MAP; got {word!r}.")
    try:
        return name, float(value)
    except ValueError:
        return name, Path(value)


@app.command()
def bids(
    maps: Annotated[Path, typer.Argument(metavar="MAPS", help="Folder of maps.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="ROOT", help="Derivative data set.")
    ],
    subject: Annotated[str, typer.Option(metavar="LABEL", help="Of sub-, such as 01.")],
    session: Annotated[str, typer.Option(metavar="LABEL", help="Of ses-.")] = "",
    acquisition: Annotated[str, typer.Option(metavar="LABEL", help="Of acq-.")] = "",
    run: Annotated[str, typer.Option(metavar="N", help="Of run-.")] = "",
    source: Annotated[
        list[str] | None,
        typer.Option(metavar="URI", help="What the maps come from; may be repeated."),
    ] = None,
    force: _Force = False,
) -> None:
    """Put a folder of maps into a BIDS derivative data set, with other subjects or alone.

    Example: fisherprint bids maps -o derivatives/fisherprint --subject 01
    """
    from fisherprint import experiment as stages
    from fisherprint import files

    paths = files.write_bids(
        maps,
        output,
        files.Entities(subject, session, acquisition, run),
        sources=source or (),
        versions=stages.versions(),
        force=force,
    )
    typer.echo(f"{len(paths)} images: {paths[0].parent.parent}")


@app.command()
def regions(
    maps: Annotated[Path, typer.Argument(metavar="MAPS", help="Folder of maps.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="TABLE", help="A .csv or .tsv.")
    ],
    labels: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Image of labels; else white matter and CSF of MAPS."),
    ] = None,
    names: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Their names: .json, or a table with index and name."),
    ] = None,
    force: _Force = False,
) -> None:
    """Medians, quartiles, means and error bars of maps over regions, as a table.

    Example: fisherprint regions maps --labels atlas.nii.gz -o regions.csv
    """
    from fisherprint import experiment as stages

    rows = stages.region_table(
        maps, output, labels=labels, names=names, force=force, say=typer.echo
    )
    found = len({row.label for row in rows})
    typer.echo(f"{found} regions, {len(rows) // found} parameters: {output}")


@app.command()
def convert(
    maps: Annotated[Path, typer.Argument(metavar="MAPS", help="Folder of maps, SI units.")],
    ways: Annotated[
        list[str], typer.Argument(metavar="NAME=UNIT", help="Such as T1=ms, B0=Hz or m0s=F.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="Folder of maps to write.")
    ],
) -> None:
    """State maps and their error bars in other units; F is the ratio m0s/(1 - m0s).

    `map` and `fit` write them so with --as NAME=UNIT, which may be repeated.

    Example: fisherprint convert maps T1=ms m0s=F -o maps-ms
    """
    from fisherprint import files

    for path in files.convert_maps(maps, output, _stated(ways)):
        typer.echo(f"written: {path}")


def _stated(words: Sequence[str]) -> dict[str, str]:
    """NAME=UNIT each."""
    stated = {}
    for word in words:
        name, equals, unit = word.partition("=")
        if not (name and equals and unit) or name in stated:
            raise typer.BadParameter(f"expected NAME=UNIT, once a name; got {word!r}.")
        stated[name] = unit
    return stated


@app.command()
def report(
    source: Annotated[
        Path, typer.Argument(metavar="RUN|TRAIN", help="Run folder, or file of a pulse train.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="PAGE.html", help="Of a train; else beside it."),
    ] = None,
    compare: Annotated[
        list[Path] | None,
        typer.Option(metavar="TRAIN", help="Another train; may be repeated."),
    ] = None,
    repetition_time: _RepetitionTime = None,
    parameters: _Parameters = None,
    snr: _Snr = None,
    scan_time: _ScanTime = None,
) -> None:
    """Write the report of a run or a pulse train, one page that needs nothing else.

    Example: fisherprint report runs/bundled
    or fisherprint report train.toml -o page.html --compare bundled
    """
    from fisherprint import experiment as stages
    from fisherprint import files

    if source.is_dir() or source.suffix not in stages.TRAIN_SUFFIXES:
        of_a_train = (output, compare, repetition_time, parameters, snr, scan_time)
        if any(option is not None for option in of_a_train):
            raise typer.BadParameter("the options are for the page of a train; got a run folder.")
        typer.echo(f"report: {stages.report_run(stages.open_run(source))}")
        return
    trains = _trains([source, *(compare or [])], repetition_time)
    question = _question(parameters=parameters, snr=snr, scan_time=scan_time)
    page = source.with_suffix(".html") if output is None else output
    files.write_text(page, stages.train_page(trains, question))
    typer.echo(f"report: {page}")


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
def vary(
    run: _Run,
    output: _Out,
    changes: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="May be repeated.")
    ],
) -> None:
    """Prepare another training on the data set of a run, with fields of its experiment changed.

    Example: fisherprint vary runs/paper -o runs/paper-mse --set training.loss=mse
    """
    from fisherprint import experiment as stages

    new = stages.vary(stages.open_run(run), output, changes)
    typer.echo(f"data set: {new.dataset}")
    typer.echo(f"next: fisherprint run {new.folder / 'experiment.toml'} -o {new.folder}")


@app.command()
def reproduce(
    crb: Annotated[Path, typer.Option(metavar="RUN", help="Evaluated run of the CRB loss.")],
    mse: Annotated[Path, typer.Option(metavar="RUN", help="The same of the MSE loss.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="For all files.")],
    quick: Annotated[
        list[Path] | None,
        typer.Option(metavar="RUN", help="Of the quick setting, both losses; repeated."),
    ] = None,
    noise: Annotated[
        int, typer.Option(metavar="N", help="Noise realizations at each point of a map.")
    ] = 1000,
) -> None:
    """Figures 3 to 8 of the paper, and its statements beside ours.

    Example: fisherprint reproduce --crb runs/paper --mse runs/paper-mse -o reproduction
    """
    from fisherprint import experiment as stages

    with _display() as display:
        stages.reproduce(
            crb,
            mse,
            output,
            quick=quick or (),
            n_noise=noise,
            say=display.say,
            progress=display.progress,
        )


@app.command()
def demo(
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="RUN", help="Else runs/demo or runs/pretrained."),
    ] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Only map, with the shipped network: a minute.")
    ] = False,
    force: _Force = False,
) -> None:
    """Simulate, train, evaluate and map a digital brain; needs no data.

    Example: fisherprint demo -o runs/demo
    """
    from fisherprint import experiment as stages

    if not pretrained:
        _run_all(stages.read(None), output or Path("runs/demo"), force)
        return
    with _display() as display:
        page = stages.shipped.demonstrate(
            stages.shipped.load(),
            output or Path("runs/pretrained"),
            force=force,
            say=display.say,
            progress=display.progress,
        )
        display.say(f"finished in {time.monotonic() - _BEGAN:.0f} seconds")
        display.say(f"report: {page.resolve()}")


@app.command()
def models() -> None:
    """List the trained networks that come with the package, and how well they do.

    Example: fisherprint models
    """
    from fisherprint import experiment as stages

    for name in stages.shipped.folders():
        typer.echo("\n".join(stages.shipped.described(stages.shipped.load(name))))


@app.command()
def ship(
    run: _Run,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="For all files.")],
    force: _Force = False,
) -> None:
    """Make a run's evaluated network a small folder, which `map --model DIR` takes.

    Example: fisherprint ship runs/bundled -o bundled
    """
    from fisherprint import experiment as stages

    trained = stages.shipped.make(stages.open_run(run), output, today=date.today(), force=force)
    typer.echo("\n".join(stages.shipped.described(trained)))


@app.command()
def design(
    wanted: Annotated[Path, typer.Argument(metavar="DESIGN.toml")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="TRAIN.toml", help="Best train so far.")
    ],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after the last finished round.")
    ] = False,
    minutes: Annotated[
        float | None, typer.Option(metavar="MIN", help="Stop after the round in which they end.")
    ] = None,
    force: _Force = False,
) -> None:
    """Search for the pulse train with the smallest bound; Ctrl-C keeps the best so far.

    Example: fisherprint design designs/bundled.toml -o train.toml
    """
    from fisherprint import experiment as stages

    with _display() as display:
        stages.design_train(
            stages.read_design(wanted),
            output,
            resume=resume,
            force=force,
            minutes=minutes,
            say=display.say,
            progress=display.progress,
        )
        display.say(f"train: {output}")


@app.command()
def export(
    train: Annotated[
        Path, typer.Argument(metavar="TRAIN", help="Pulse train: .toml, .h5, .mat or .seq.")
    ],
    pulseq: Annotated[
        Path, typer.Option("--pulseq", metavar="OUT.seq", help="Pulseq file to write.")
    ],
    repetition_time: _RepetitionTime = None,
    fov: Annotated[float, typer.Option(metavar="MM", help="Field of view in mm.")] = 256.0,
    matrix: Annotated[int, typer.Option(metavar="N", help="Voxels across it.")] = 256,
    cycles: Annotated[int, typer.Option(metavar="N", help="Cycles read out.")] = 180,
    max_grad: Annotated[float, typer.Option(metavar="MT/M", help="Gradient limit, mT/m.")] = 40.0,
    max_slew: Annotated[float, typer.Option(metavar="T/M/S", help="Slew limit in T/m/s.")] = 150.0,
    rf_raster: Annotated[float, typer.Option(metavar="US", help="Pulse raster in µs.")] = 1.0,
    round_durations: Annotated[
        bool, typer.Option("--round-durations", help="Round pulse durations to that raster.")
    ] = False,
    force: _Force = False,
) -> None:
    """Write a train as a 3D radial scan in Pulseq, its trajectory beside it.

    Example: fisherprint export train.toml --pulseq scan.seq --matrix 192
    """
    from fisherprint import files
    from fisherprint import pulseq as scanner
    from fisherprint.sequence import PulseTrain

    beside = scanner.trajectory_path(pulseq)
    for product in (pulseq, beside):
        if product.exists() and not force:
            raise files.OutputExistsError(
                f"{product} is already there. Choose another name, or replace it with --force."
            )
    scan = scanner.Scan(
        field_of_view=fov * 1e-3,
        matrix=matrix,
        cycles=cycles,
        max_gradient=max_grad * 1e-3,
        max_slew=max_slew,
        rf_raster=rf_raster * 1e-6,
    )
    repetition = None if repetition_time is None else repetition_time * 1e-3
    wanted = PulseTrain.read(train, repetition_time=repetition)
    with _display() as display:
        if round_durations:
            rounded = scanner.on_raster(wanted, scan.rf_raster)
            change = abs(rounded.pulse_duration - wanted.pulse_duration).max()
            display.say(f"durations rounded by up to {1e6 * change:.3g} µs; simulate {pulseq}")
            wanted = rounded
        done = scanner.write(wanted, pulseq, scan, progress=display.progress)
        display.say(
            f"{done.n_repetitions} repetitions in {done.duration / 60:.1f} minutes "
            f"({cycles} cycles and {scan.dummy_cycles} dummies of {wanted.duration:.3g} s)"
        )
        display.say(
            f"readout {1e3 * done.readout_time:.3f} ms a spoke; at most "
            f"{1e3 * done.peak_gradient:.1f} mT/m, {done.peak_slew:.0f} T/m/s, "
            f"{1e6 * done.peak_b1:.1f} µT"
        )
        display.say("timing check: passed")
        display.say(f"sequence: {pulseq}")
        display.say(f"trajectory: {beside}")


@app.command()
def onnx(
    run: _Run,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT.onnx")],
    force: _Force = False,
) -> None:
    """Write a run's network as ONNX, for programs without Python.

    Example: fisherprint onnx runs/bundled -o network.onnx
    """
    from fisherprint import experiment as stages

    stages.write_onnx(stages.open_run(run), output, force=force)
    typer.echo(f"network: {output}")


# Here too.
@app.command(
    help="What a train can see: √CRB of each parameter in tissues, complex M0 unknown.\n"
    "Example: fisherprint crb train.toml bundled --tissue CSF --scan-time 60"
)
def crb(
    train: Annotated[
        list[Path] | None,
        typer.Argument(metavar="TRAIN", help="Pulse trains, side by side; else the bundled one."),
    ] = None,
    tissue: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Tissue, or prior; may be repeated."),
    ] = None,
    parameters: _Parameters = None,
    known: Annotated[
        list[str] | None, typer.Option(metavar="NAMES", help="Parameters that are no unknowns.")
    ] = None,
    b0: Annotated[
        list[float] | None, typer.Option(metavar="RAD/S", help="Off-resonance in rad/s.")
    ] = None,
    b1: Annotated[list[float] | None, typer.Option(metavar="B1", help="Relative B1.")] = None,
    snr: _Snr = None,
    scan_time: _ScanTime = None,
    rank: Annotated[
        int | None, typer.Option(metavar="K", help="Bounds of K coefficients, too.")
    ] = None,
    repetition_time: _RepetitionTime = None,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it as CSV.")] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it as JSON.")] = None,
) -> None:
    """What a train can see."""
    from fisherprint import experiment as stages

    trains = _trains(train or [Path(stages.BUNDLED)], repetition_time)
    question = _question(
        tissues=tissue,
        parameters=parameters,
        known=known,
        b0=b0,
        b1=b1,
        snr=snr,
        scan_time=scan_time,
        rank=rank,
    )
    table = stages.bound_table(trains, question)
    _print_bounds(table)
    for path, write in ((csv, stages.write_bounds_csv), (json, stages.write_bounds_json)):
        if path is not None:
            write(path, table, trains)
            typer.echo(f"written: {path}")


def _trains(paths: Sequence[Path], milliseconds: float | None) -> dict[str, PulseTrain]:
    from fisherprint import experiment as stages

    time = None if milliseconds is None else milliseconds * 1e-3
    return stages.read_trains(paths, repetition_time=time)


def _question(**options: Any) -> Question:
    """What is asked by the options that were given; several names may stand with commas."""
    from fisherprint import experiment as stages

    given = {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        if isinstance(value, list):
            parts = [v.split(",") if isinstance(v, str) else [v] for v in value]
            given[name] = tuple(p.strip() if isinstance(p, str) else p for ps in parts for p in ps)
    return stages.Question(**given)


def _print_bounds(table: BoundTable) -> None:
    """The table for people: drawn on a terminal, columns of plain text elsewhere."""
    from fisherprint.report import bound_lines

    head, rows, notes = bound_lines(table)
    console = Console(highlight=False)
    drawn = Table(box=box.SIMPLE_HEAD if console.is_terminal else None, pad_edge=False)
    for i, title in enumerate(head):
        # The label of a train may be long.
        drawn.add_column(
            title, justify="left" if i < 2 else "right", max_width=24, overflow="fold"
        )
    for row in rows:
        drawn.add_row(*row)
    # No number is cut off: a narrow terminal breaks the lines itself.
    options = console.options.update(width=10_000)
    console.width = max(console.width, Measurement.get(console, options, drawn).maximum)
    console.print(drawn)
    for note in notes:
        console.print(note, markup=False, soft_wrap=True)


def _known_maps(given: Sequence[str]) -> dict[str, Path]:
    known: dict[str, Path] = {}
    for word in given:
        name, equals, path = word.partition("=")
        if not (name and equals and path) or name in known:
            raise typer.BadParameter(
                f"expected --known NAME=FILE, each name once; got {word!r}. Such as: B1=b1.nii.gz"
            )
        known[name] = Path(path)
    return known


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


def _source(run: Path | None, model: str | None, option: str = "--run") -> Run | Trained:
    """A run, or a shipped network."""
    from fisherprint import experiment as stages

    if run is not None and model is None:
        return stages.open_run(run)
    if model is not None and run is None:
        return stages.shipped.load(model)
    raise typer.BadParameter(f"expected {option} or --model; got both or neither. Name one.")


# As for `crb`; what a file mostly says itself, docs/reconstruction.md lists.
@app.command(
    name="reconstruct",
    help="Raw data to coefficient images in a run's basis; Ctrl-C keeps what there is.\n"
    "Example: fisherprint reconstruct scan.h5 --run RUN -o c.nii.gz --llr 1e-4",
)
def reconstruct_(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Of .h5, ISMRMRD or .cfl.")],
    output: Annotated[Path, typer.Option("--output", "-o", help=".nii.gz or .cfl.")],
    run: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Has the basis; or --model NAME.")
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", hidden=True)] = None,
    llr: Annotated[float | None, typer.Option(metavar="λ", help="Locally low rank.")] = None,
    block: Annotated[
        int, typer.Option(metavar="B", help="Its blocks: edge; else 8.", show_default=False)
    ] = 8,
    l2: Annotated[float | None, typer.Option(metavar="λ", help="Or λ‖x‖².")] = None,
    iterations: Annotated[
        int, typer.Option(metavar="N", help="Else 30.", show_default=False)
    ] = 30,
    coils: Annotated[
        int, typer.Option(metavar="N", help="Virtual ones; else 20.", show_default=False)
    ] = 20,
    sensitivities: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Of the coils; else ESPIRiT.")
    ] = None,
    trajectory: Annotated[
        Path | None, typer.Option(metavar="FILE", help="If DATA has none.")
    ] = None,
    trajectory_scale: Annotated[float | None, typer.Option(metavar="F", hidden=True)] = None,
    matrix: Annotated[str | None, typer.Option(metavar="N0,N1,N2", hidden=True)] = None,
    memory: Annotated[float | None, typer.Option(metavar="GIB", hidden=True)] = None,
    scheduler: Annotated[str | None, typer.Option(metavar="tcp://HOST:PORT", hidden=True)] = None,
    work: Annotated[Path | None, typer.Option(metavar="DIR", hidden=True)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after Ctrl-C.")] = False,
    force: _Force = False,
) -> None:
    """Coefficient images of raw data."""
    from fisherprint import experiment as stages
    from fisherprint import files

    if not (force or resume):
        stages.require_absent(output)
    voxels = None if matrix is None else tuple(int(n) for n in matrix.split(","))
    if voxels is not None and len(voxels) != 3:
        raise typer.BadParameter(f"--matrix takes three numbers, N0,N1,N2; got {matrix}.")
    wanted = stages.Reconstruction(llr, l2, block, iterations, coils, sensitivities, memory)
    with stages.workers(None, scheduler) as pool, _display() as display:
        stages.reconstruct_run(
            _source(run, model),
            data,
            output,
            wanted,
            reading=files.Reading(None, trajectory, trajectory_scale, voxels),
            work=work,
            resume=resume,
            executor=None if scheduler is None else pool.executor,
            say=display.say,
            progress=display.progress,
        )
        display.say(f"images: {output}")


@app.command()
def scan(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="SCAN.h5")],
    run: Annotated[Path | None, typer.Argument(metavar="RUN", help="Run folder,")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="or a shipped network.")
    ] = None,
    matrix: Annotated[int, typer.Option(metavar="N", help="Voxels along an edge.")] = 48,
    fov: Annotated[float, typer.Option(metavar="MM", help="Field of view in mm.")] = 224.0,
    cycles: Annotated[int, typer.Option(metavar="N", help="Cycles of the train.")] = 20,
    coils: Annotated[int, typer.Option(metavar="N")] = 8,
    noise: Annotated[
        float, typer.Option(metavar="σ", help="Of Re and Im of a sample, |M0| ≤ 1.")
    ] = 0.01,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    force: _Force = False,
) -> None:
    """A digital scan: radial k-space of the digital brain with a run's train.

    Example: fisherprint scan runs/demo -o scan.h5 --cycles 20
    """
    from fisherprint import experiment as stages

    if not force:
        stages.require_absent(output)
    wanted = stages.DigitalScan(
        matrix, fov, cycles=cycles, coils=coils, noise_std=noise, seed=seed
    )
    with _display() as display:
        stages.scan_brain(
            _source(run, model, "RUN"),
            output,
            wanted,
            say=display.say,
            progress=display.progress,
        )


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
    print("interrupted; finished shards, epochs, rounds and stages are kept", file=sys.stderr)
    # Leave at once: threads of compiled code may still be busy.
    sys.stderr.flush()
    os._exit(130)


if __name__ == "__main__":
    main()
