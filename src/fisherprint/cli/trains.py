"""Commands around a pulse train: its design, what it can see, its way to the scanner."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from fisherprint.cli.shell import (
    Force,
    ParameterNames,
    RepetitionTime,
    ScanTime,
    Snr,
    app,
    question_of,
    read_trains,
    shown,
)

if TYPE_CHECKING:
    from fisherprint.bounds import BoundTable


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
    force: Force = False,
) -> None:
    """Search for the pulse train with the smallest bound; Ctrl-C keeps the best so far.

    Example: fisherprint design designs/bundled.toml -o train.toml
    """
    from fisherprint import experiment as stages

    with shown() as display:
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
    parameters: ParameterNames = None,
    known: Annotated[
        list[str] | None, typer.Option(metavar="NAMES", help="Parameters that are no unknowns.")
    ] = None,
    b0: Annotated[
        list[float] | None, typer.Option(metavar="RAD/S", help="Off-resonance in rad/s.")
    ] = None,
    b1: Annotated[list[float] | None, typer.Option(metavar="B1", help="Relative B1.")] = None,
    snr: Snr = None,
    scan_time: ScanTime = None,
    rank: Annotated[
        int | None,
        typer.Option(metavar="K", help="K coefficients too (--basis-method M)."),
    ] = None,
    # Beside what it belongs to, so that the help fits a screen.
    basis_method: Annotated[str | None, typer.Option(hidden=True)] = None,
    repetition_time: RepetitionTime = None,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it as CSV.")] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it as JSON.")] = None,
) -> None:
    """What a train can see."""
    from fisherprint import experiment as stages

    trains = read_trains(train or [Path(stages.BUNDLED)], repetition_time)
    question = question_of(
        tissues=tissue,
        parameters=parameters,
        known=known,
        b0=b0,
        b1=b1,
        snr=snr,
        scan_time=scan_time,
        rank=rank,
        basis_method=basis_method,
    )
    table = stages.bound_table(trains, question)
    _print_bounds(table)
    for path, write in ((csv, stages.write_bounds_csv), (json, stages.write_bounds_json)):
        if path is not None:
            write(path, table, trains)
            typer.echo(f"written: {path}")


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


@app.command()
def export(
    train: Annotated[
        Path, typer.Argument(metavar="TRAIN", help="Pulse train: a file, or bundled.")
    ],
    pulseq: Annotated[
        Path, typer.Option("--pulseq", metavar="OUT.seq", help="Pulseq file to write.")
    ],
    repetition_time: RepetitionTime = None,
    fov: Annotated[float, typer.Option(metavar="MM", help="Field of view in mm.")] = 256.0,
    matrix: Annotated[int, typer.Option(metavar="N", help="Voxels across it.")] = 256,
    cycles: Annotated[int, typer.Option(metavar="N", help="Cycles read out.")] = 180,
    max_grad: Annotated[float, typer.Option(metavar="MT/M", help="Gradient limit, mT/m.")] = 40.0,
    max_slew: Annotated[float, typer.Option(metavar="T/M/S", help="Slew limit in T/m/s.")] = 150.0,
    rf_raster: Annotated[float, typer.Option(metavar="US", help="Pulse raster in µs.")] = 1.0,
    round_durations: Annotated[
        bool, typer.Option("--round-durations", help="Round pulse durations to that raster.")
    ] = False,
    force: Force = False,
) -> None:
    """Write a train as a 3D radial scan in Pulseq, its trajectory beside it.

    Example: fisherprint export train.toml --pulseq scan.seq --matrix 192
    """
    from fisherprint import files
    from fisherprint import pulseq as scanner

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
    (wanted,) = read_trains([train], repetition_time).values()
    with shown() as display:
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
