"""Commands around images: scan, reconstruct, map, fit, and what becomes of maps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fisherprint.cli.shell import (
    Force,
    Units,
    app,
    named,
    shown,
    source_of,
)

_KNOWN, _FIXED = "--known NAME=FILE", "--known NAME=VALUE or NAME=FILE"


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
    stated: Units = None,
) -> None:
    """Map coefficient images with a trained network."""
    from fisherprint import experiment as stages

    if (basis is None) != (basis_key is None):
        raise typer.BadParameter("--basis and --basis-key belong together; got one of them.")
    source = source_of(run, model)
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
        known={name: Path(word) for name, word in named(known or (), _KNOWN).items()},
    )
    with shown() as display:
        stages.map_run(
            source,
            section,
            output,
            force=force,
            overwrite=overwrite,
            stated=named(stated or ()),
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
    coefficients: Annotated[
        Path, typer.Argument(metavar="COEFFICIENTS", help="In .mat and .h5: --key NAME.")
    ],
    run: Annotated[Path, typer.Option(metavar="RUN", help="Run folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Folder of maps.")],
    # As in `map`: keys stand beside their files.
    key: Annotated[str | None, typer.Option(hidden=True)] = None,
    mask: Annotated[Path | None, typer.Option(help="Or --mask-key NAME; else automatic.")] = None,
    mask_key: Annotated[str | None, typer.Option(hidden=True)] = None,
    known: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE|MAP", help="Not fitted; repeated.")
    ] = None,
    start: Annotated[
        str | None, typer.Option(metavar="N|MAPS|RUN", help="Else RUN's network, or 4 starts.")
    ] = None,
    noise_std: Annotated[
        float | None, typer.Option(help="σ; else residual's or background's.")
    ] = None,
    prior: Annotated[
        float | None, typer.Option(metavar="WIDTH", help="Weigh in the prior; 1: as it is.")
    ] = None,
    two_steps: Annotated[
        bool, typer.Option("--two-steps", help="Damped, from the start; no search.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="Or --scheduler tcp://HOST:PORT.")
    ] = None,
    scheduler: Annotated[str | None, typer.Option(hidden=True)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it takes.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace maps that are there.")
    ] = False,
    stated: Units = None,
) -> None:
    """Fit coefficient images by least squares."""
    from fisherprint import experiment as stages

    section = stages.MapSection(
        coefficients=coefficients, key=key, mask=mask, mask_key=mask_key, noise_std=noise_std
    )
    with stages.workers(workers, scheduler) as pool, shown() as display:
        stages.fit_run(
            stages.open_run(run),
            section,
            output,
            known={name: _fixed(word) for name, word in named(known or (), _FIXED).items()},
            start=None if start is None else int(start) if start.isdigit() else Path(start),
            prior=prior,
            two_steps=two_steps,
            overwrite=overwrite,
            stated=named(stated or ()),
            executor=pool.executor,
            n_workers=pool.number,
            dry_run=dry_run,
            say=display.say,
            progress=display.progress,
        )
        if not dry_run:
            display.say(f"maps: {output}")


def _fixed(word: str) -> float | Path:
    """A value, or the file of a map."""
    try:
        return float(word)
    except ValueError:
        return Path(word)


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
    force: Force = False,
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
    force: Force = False,
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

    for path in files.convert_maps(maps, output, named(ways)):
        typer.echo(f"written: {path}")


@app.command()
def scan(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="SCAN.h5")],
    run: Annotated[Path | None, typer.Argument(metavar="RUN", help="Run folder,")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="or a shipped network.")
    ] = None,
    matrix: Annotated[int, typer.Option(metavar="N", help="Voxels along an edge.")] = 48,
    fov: Annotated[
        float | None, typer.Option(metavar="MM", help="Field of view; else 224, tubes 128.")
    ] = None,
    tubes: Annotated[
        bool, typer.Option("--tubes", help="A slice of the tubes, not the brain.")
    ] = False,
    cycles: Annotated[int, typer.Option(metavar="N", help="Cycles of the train.")] = 20,
    coils: Annotated[int, typer.Option(metavar="N")] = 8,
    noise: Annotated[
        float,
        typer.Option(metavar="σ", help="Of Re, Im where |M0| ≤ 1; else 0.01.", show_default=False),
    ] = 0.01,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    force: Force = False,
) -> None:
    """A digital scan: radial k-space of brain or tubes with a run's train.

    Example: fisherprint scan runs/demo -o scan.h5 --cycles 20
    """
    from fisherprint import experiment as stages

    if not force:
        stages.require_absent(output)
    wanted = stages.DigitalScan(
        matrix, fov, cycles=cycles, coils=coils, noise_std=noise, seed=seed, tubes=tubes
    )
    with shown() as display:
        stages.scan_phantom(
            source_of(run, model, "RUN"),
            output,
            wanted,
            say=display.say,
            progress=display.progress,
        )


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
        int | None, typer.Option(metavar="B", help="Its blocks: edge; else 8.")
    ] = None,
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
    force: Force = False,
) -> None:
    """Coefficient images of raw data."""
    from fisherprint import experiment as stages
    from fisherprint import files

    if not (force or resume):
        stages.require_absent(output)
    voxels = None
    if matrix is not None:
        parts = matrix.split(",")
        if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
            raise typer.BadParameter(f"--matrix takes three numbers, N0,N1,N2; got {matrix}.")
        voxels = int(parts[0]), int(parts[1]), int(parts[2])
    wanted = stages.Reconstruction(llr, l2, block, iterations, coils, sensitivities, memory)
    with stages.workers(None, scheduler) as pool, shown() as display:
        stages.reconstruct_run(
            source_of(run, model),
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
