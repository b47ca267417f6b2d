"""Commands around a run: simulate, train, evaluate, report, ship."""

from __future__ import annotations

import time
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fisherprint.cli.shell import (
    BEGAN,
    DataFolder,
    ExperimentFile,
    Force,
    OutputRun,
    ParameterNames,
    RepetitionTime,
    RunFolder,
    ScanTime,
    Scheduler,
    Snr,
    Workers,
    app,
    question_of,
    read_trains,
    shown,
)

if TYPE_CHECKING:
    from fisherprint.experiment import Experiment


@app.command()
def simulate(
    experiment: ExperimentFile,
    output: OutputRun,
    data: DataFolder = None,
    workers: Workers = None,
    scheduler: Scheduler = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it takes.")] = False,
    force: Force = False,
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
                start=time.monotonic() - BEGAN,
            )
            typer.echo("\n".join(lines))
        return
    run = stages.start(wanted, output, force=force)
    stages.require_absent(run.dataset, replaced="it, and the network trained with it,")
    with stages.workers(workers, scheduler) as pool, shown() as display:
        stages.simulate_run(run, executor=pool.executor, progress=display.progress)
        display.say(f"data set: {run.dataset}")


@app.command()
def train(
    run: RunFolder,
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

    with training.together() as ranks, shown(quiet=ranks.rank > 0) as display:
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
def evaluate(run: RunFolder, force: Force = False) -> None:
    """Bias, variance and loss of a run's network on its test set, by SNR.

    Example: fisherprint evaluate runs/bundled
    """
    from fisherprint import experiment as stages

    opened = stages.open_run(run)
    if not force:
        stages.require_absent(opened.audit)
    with shown() as display:
        stages.evaluate_run(opened, say=display.say, progress=display.progress)


@app.command(name="run")
def run_(
    experiment: ExperimentFile,
    output: OutputRun,
    data: DataFolder = None,
    workers: Workers = None,
    scheduler: Scheduler = None,
    force: Force = False,
) -> None:
    """All stages of an experiment, skipping those already done.

    Example: fisherprint run experiments/bundled.toml -o runs/bundled
    """
    from fisherprint import experiment as stages

    _run_all(stages.read(experiment, data=data), output, force, workers, scheduler)


@app.command()
def vary(
    run: RunFolder,
    output: OutputRun,
    changes: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="Repeatable; KEY= unsets.")
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
    repetition_time: RepetitionTime = None,
    parameters: ParameterNames = None,
    snr: Snr = None,
    scan_time: ScanTime = None,
) -> None:
    """Write the report of a run or a pulse train, one page that needs nothing else.

    Example: fisherprint report runs/bundled
    or fisherprint report train.toml -o page.html --compare bundled
    """
    from fisherprint import experiment as stages
    from fisherprint import files

    is_train = source == Path(stages.BUNDLED) or source.suffix.lower() in stages.TRAIN_SUFFIXES
    if source.is_dir() or not is_train:
        of_a_train = (output, compare, repetition_time, parameters, snr, scan_time)
        if any(option is not None for option in of_a_train):
            raise typer.BadParameter("the options are for the page of a train; got a run folder.")
        typer.echo(f"report: {stages.report_run(stages.open_run(source))}")
        return
    trains = read_trains([source, *(compare or [])], repetition_time)
    question = question_of(parameters=parameters, snr=snr, scan_time=scan_time)
    page = source.with_suffix(".html") if output is None else output
    files.write_text(page, stages.train_page(trains, question))
    typer.echo(f"report: {page}")


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

    with shown() as display:
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
    force: Force = False,
) -> None:
    """Simulate, train, evaluate and map a digital brain; needs no data.

    Example: fisherprint demo -o runs/demo
    """
    from fisherprint import experiment as stages

    if not pretrained:
        _run_all(stages.read(None), output or Path("runs/demo"), force)
        return
    with shown() as display:
        page = stages.shipped.demonstrate(
            stages.shipped.load(),
            output or Path("runs/pretrained"),
            force=force,
            say=display.say,
            progress=display.progress,
        )
        display.say(f"finished in {time.monotonic() - BEGAN:.0f} seconds")
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
    run: RunFolder,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="For all files.")],
    force: Force = False,
) -> None:
    """Make a run's evaluated network a small folder, which `map --model DIR` takes.

    Example: fisherprint ship runs/bundled -o bundled
    """
    from fisherprint import experiment as stages

    trained = stages.shipped.make(stages.open_run(run), output, today=date.today(), force=force)
    typer.echo("\n".join(stages.shipped.described(trained)))


@app.command()
def onnx(
    run: RunFolder,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT.onnx")],
    force: Force = False,
) -> None:
    """Write a run's network as ONNX, for programs without Python.

    Example: fisherprint onnx runs/bundled -o network.onnx
    """
    from fisherprint import experiment as stages

    stages.write_onnx(stages.open_run(run), output, force=force)
    typer.echo(f"network: {output}")


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
    with stages.workers(workers, scheduler) as pool, shown() as display:
        page = stages.run_all(
            run, executor=pool.executor, say=display.say, progress=display.progress
        )
        display.say(f"finished in {(time.monotonic() - began) / 60:.1f} minutes")
        display.say(f"report: {page.resolve()}")
