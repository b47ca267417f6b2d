"""The report page of a run, of as many stages as are done."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from fisherprint import evaluate as evaluation
from fisherprint import files, maps, report, simulate
from fisherprint.experiment import bound_pages
from fisherprint.experiment.folder import Run, read_data, region_file, versions
from fisherprint.experiment.schema import shareable
from fisherprint.parameters import Parameter
from fisherprint.reconstruct import phantom
from fisherprint.sequence import PulseTrain

# Limits of colours for brains, SI units.
_BRAIN_RANGES = {"m0s": (0.0, 0.3), "T1": (0.6, 2.4), "T1f": (1.0, 3.5), "T2f": (0.04, 0.14)}

# How each region of the maps is found; T1 is the name of the map that tells.
_RULES = {
    "white matter": "White matter is found from the joint mode of m0s and {T1} alone.",
    "CSF": f"CSF is where {{T1}} is at least {maps.FLUID_T1:g} s, whatever the other maps say.",
}


def report_run(run: Run) -> Path:
    """Stage 5: the page, of as many stages as there are.

    Raises:
        ExperimentError: there is no data set yet.
        UnreadableFileError: a product of a stage is damaged.
    """
    experiment, estimated = run.experiment, run.experiment.training.estimated
    data, pulses, model = read_data(run)
    described, everything = (
        [model.parameters[model.index(name)] for name in names]
        for names in (estimated, data.names)
    )
    known = experiment.training.inputs
    unknown = [name for name in data.names if name not in known]
    sections = []
    facts = [
        f"{pulses.n_samples} pulses in {len(pulses.flip_angle)} train(s), "
        f"{pulses.duration:.1f} s, TR {1e3 * pulses.repetition_time:g} ms. "
        f"The Fisher matrix has {', '.join(unknown)} and complex M0 as unknowns."
        + (f" The network is told {' and '.join(known)}." if known else "")
    ]
    if run.audit.exists():
        audit, score = files.read_audit(run.audit)
        facts.append(
            f"On test data the network's loss, averaged over the training range of M0, is "
            f"{score.loss:.2f} ± {score.standard_error:.2f} (1: as good as any unbiased estimator "
            "can be; shrinking towards the prior can go below)."
        )
    if (run.maps / "summary.json").exists():
        sections += map_sections(run, described)
    if run.audit.exists():
        sections += _audit_sections(run, audit, score, described)
    if run.log.exists():
        figure = report.convergence(files.read_jsonl(run.log), experiment.training.loss)
        caption = (
            "Loss on the training and on the validation set after each epoch. For the CRB loss, "
            "1 is what a maximally efficient unbiased estimator scores (Fig. 3 of the paper)."
        )
        sections.append(report.Section("Convergence", caption, figure))
    trains, models = {"train": pulses}, {"train": model}
    sections.append(bound_pages.train_section(trains))
    # The slow reference has no magnetization to show, and takes minutes for a map.
    if experiment.model.saturation != "generalized Bloch":
        sections += bound_pages.magnetization_sections(trains, models)
        sections += bound_pages.bound_sections(
            trains,
            models,
            bound_pages.Question(known=known),
            bases={"train": data.basis},
            shown=described,
        )
    caption = (
        f"By how much {data.basis.rank} coefficients raise the bound of the variance, compared "
        f"with the whole signal. The basis holds {data.energy:.5%} of the signals' energy."
        + (" Here all parameters are unknown." if known else "")
    )
    figure = report.compression_cost(data, everything)
    sections.append(report.Section("What compression costs", caption, figure))
    html = report.page(
        experiment.title, "\n\n".join(facts), sections, provenance=_provenance(run, data, pulses)
    )
    files.write_text(run.report, html)
    return run.report


def _audit_sections(
    run: Run, audit: evaluation.Audit, score: evaluation.Score, described: list[Parameter]
) -> list[report.Section]:
    config = run.experiment.training
    low, high = (scale / config.noise_std for scale in config.scale_range)
    near = float(audit.snr[np.abs(np.log(audit.snr / 50)).argmin()])
    sections = [
        report.Section(
            "Loss and its shares",
            "Mean squared error in units of the bound of the coefficients, split into bias and "
            "variance, against SNRmax; the range of the training is shaded (Fig. 7). A network "
            "may trade bias for variance, so look at both.",
            [
                report.score_table({config.loss: score}, described),
                report.loss_shares(audit, described, training_snr=(low, high)),
                report.shares_table(audit, described),
            ],
        ),
        report.Section(
            f"Bias and standard deviation at SNR {near:g}",
            "Bias of each test fingerprint (Fig. 5), its standard deviation over √CRB (Fig. 6), "
            "and the shares of the loss against √CRB (Fig. 8).",
            [
                report.bias_histograms(audit, described, snr=near),
                report.std_histograms(audit, described, snr=near),
                report.shares_by_bound(audit, described, snr=near),
            ],
        ),
    ]
    if audit.prior is not None:
        sections.append(
            report.Section(
                "Where the prior matters",
                "Root mean squared error over the test set, beside what unbiased estimators can "
                "reach (√CRB) and what those can that know the prior (van Trees). Where √CRB "
                "nears the spread of the prior, a network does well to be biased, and the "
                "second is the reference.",
                [report.errors_and_bounds(audit, described), report.prior_table(audit, described)],
            )
        )
    return sections


def map_sections(run: Run, described: list[Parameter]) -> list[report.Section]:
    """The maps in a run folder; of the digital brain, beside the truth."""
    estimate = files.read_maps(run.maps, [parameter.name for parameter in described])
    if run.experiment.brain is None:
        figure, tables = _picture(run, estimate, described), []
        caption = "Each voxel estimated by itself."
        there = files.read_json(run.maps / "summary.json")["regions"]
        found = [region for region in _RULES if region in there]
        if found:
            T1 = maps.longitudinal(estimate.maps.names)
            rules = (_RULES[region].format(T1=T1) for region in found)
            caption = " ".join(
                (caption, *rules, "Beside medians and quartiles: values of the literature at 3 T.")
            )
            regions = {
                region: files.read_mask(run.maps / region_file(region), estimate.mask.shape)
                for region in found
            }
            literature = {region: _literature(region, described) for region in found}
            table = report.roi_table(estimate.maps, regions, described, expected=literature)
            tables.append(table)
        section = report.Section("Parameter maps", caption, [figure, *tables])
        return [section, *_error_sections(run, estimate, described)]
    truth = files.read_maps(run.brain / "truth", [parameter.name for parameter in described])
    regions = {
        path.name.removesuffix(".nii.gz").replace("_", " "): files.read_mask(
            path, estimate.mask.shape
        )
        for path in sorted((run.brain / "tissues").glob("*.nii.gz"))
    }
    expected = {
        name: {p.name: float(np.median(truth.maps[p.name][inside])) for p in described}
        for name, inside in regions.items()
    }
    caption = (
        f"A brain of known parameters, noise at SNR {run.experiment.brain.snr:g} where |M0| = 1: "
        "estimate, truth and difference. Below, medians and quartiles in voxels of one tissue, "
        "beside the truth."
    )
    figure = report.map_panel(
        estimate.maps, described, truth=truth.maps, ranges=_BRAIN_RANGES, affine=estimate.affine
    )
    table = report.roi_table(estimate.maps, regions, described, expected=expected)
    section = report.Section("Digital brain", caption, [figure, table])
    return [section, *_error_sections(run, estimate, described)]


def _error_sections(
    run: Run, estimate: files.PlacedMaps, described: list[Parameter]
) -> list[report.Section]:
    """Standard deviations and the status of each voxel, where the maps have them."""
    if not (run.maps / "status.nii.gz").exists():
        return []  # of an early version
    about = files.read_json(run.maps / "status.json")["Provenance"].get("noise")
    turns, affine = 0, estimate.affine
    if affine is None and run.experiment.map is not None:
        turns = run.experiment.map.quarter_turns
    status = files.read_status(run.maps, estimate.mask.shape)
    figures = [report.status_panel(np.rot90(status, turns), affine=affine)]
    caption = "What is to be thought of each voxel, with its share of the mask."
    if about is not None:
        std = files.read_maps(run.maps, [f"{parameter.name}_std" for parameter in described]).maps
        shown = [
            replace(
                parameter, name=f"{parameter.name}_std", symbol=rf"$\sigma$ of {parameter.symbol}"
            )
            for parameter in described
        ]
        turned = {p.name: np.rot90(std[p.name], turns) for p in shown}
        figures = [report.map_panel(turned, shown, affine=affine), *figures]
        caption = (
            "Standard deviation of each estimate as an efficient estimator would have it: √CRB at "
            f"the estimate, for noise of σ = {about['std'] or np.nan:.3g} (from: "
            f"{about['source']}). A network may scatter less and be biased instead. " + caption
        )
    return [report.Section("Error bars", caption, figures)]


def _literature(region: str, described: list[Parameter]) -> dict[str, float]:
    tissue = phantom.TISSUES[region]
    names = [p.name for p in described if p.name in phantom.TISSUE_PARAMETERS]
    return {name: getattr(tissue, name) for name in names}


def _picture(run: Run, estimate: files.PlacedMaps, described: list[Parameter]) -> Figure:
    """Maps upright by their affine; without one, turned as the experiment says."""
    section = run.experiment.map
    ranges = {} if section is None else section.ranges
    if estimate.affine is not None or section is None:
        return report.map_panel(estimate.maps, described, ranges=ranges, affine=estimate.affine)
    turned = {p.name: np.rot90(estimate.maps[p.name], section.quarter_turns) for p in described}
    return report.map_panel(turned, described, ranges=ranges)


def _provenance(run: Run, data: simulate.DataSet, pulses: PulseTrain) -> dict[str, object]:
    sizes = {split: len(samples.theta) for split, samples in data.samples.items()}
    return {
        "experiment": files.to_toml(shareable(run.experiment)),
        "fingerprints": ", ".join(f"{split} {size}" for split, size in sizes.items()),
        "train SHA-256": pulses.digest,
        "basis SHA-256": data.basis.digest,
        "data set SHA-256": files.file_digest(run.dataset),
        **versions(),
    }
