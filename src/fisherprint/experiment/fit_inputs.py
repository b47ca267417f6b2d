"""What a fit of a volume begins with: images, known maps, starts, and what the prior says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fisherprint import _checks, _storage, files, maps, train
from fisherprint.experiment import mapping
from fisherprint.experiment.folder import Run, Say, open_run
from fisherprint.experiment.known import read_known
from fisherprint.experiment.schema import ExperimentError, MapSection
from fisherprint.models.protocol import SignalModel
from fisherprint.network import as_estimator
from fisherprint.parameters import Prior, TruncatedNormal, paper_prior
from fisherprint.sequence import PulseTrain
from fisherprint.simulate import DataSet
from fisherprint.subspace import Basis

TWO_STEPS = (0.5, 15.0)
"""Standard deviations of the prior within which each of two steps keeps near its beginning.

Why these: docs/decisions/046-two-steps.md.
"""


@dataclass(frozen=True, eq=False)
class Voxels:
    """What is known of the voxels in the mask.

    Attributes:
        x: coefficients, shape (V, K).
        known: maps of known parameters by name, shape (V,) each.
        start: earlier estimates by name, shape (V,) each, NaN where there are none.
    """

    x: NDArray[np.complex64]
    known: Mapping[str, NDArray[np.float64]]
    start: Mapping[str, NDArray[np.float64]]

    def at(self, where: NDArray[np.intp]) -> Voxels:
        """Those with some indices."""
        known, start = (
            {name: values[where] for name, values in maps.items()}
            for maps in (self.known, self.start)
        )
        return Voxels(self.x[where], known, start)

    @property
    def digest(self) -> str:
        """SHA-256 of all of it."""
        names = np.array([*self.known, *self.start], dtype=np.str_)
        return _storage.digest(self.x, names, *self.known.values(), *self.start.values())


def read_images(
    section: MapSection, data: DataSet, pulses: PulseTrain, say: Say
) -> tuple[files.Volume, NDArray[np.bool_], str | None]:
    """Images in the run's basis, their mask, and the identity of their basis if it is known."""
    volume = files.read_coefficients(
        section.coefficients,
        key=section.key,
        mask_key=section.mask_key if section.mask is None else None,
        rank=data.basis.rank,
    )
    recorded = mapping.basis_of_images(section, pulses)
    if recorded is None:
        say("the images do not say which basis they were made with; only the rank was checked")
    elif recorded != data.basis.digest:
        raise mapping.BasisMismatchError(
            f"expected coefficients in the data set's basis {data.basis.digest[:12]}...; "
            f"{section.coefficients} was made with {recorded[:12]}.... Reconstruct it with the "
            "basis of this run."
        )
    mask = volume.mask
    if section.mask is not None:
        mask = files.read_mask(section.mask, volume.data.shape[:3], key=section.mask_key)
    return volume, maps.automatic_mask(volume.data) if mask is None else mask, recorded


def read_voxels(
    run: Run,
    volume: files.Volume,
    mask: NDArray[np.bool_],
    model: SignalModel,
    noise_std: float | None,
    basis: Basis,
    known: Mapping[str, float | Path],
    bounds: Mapping[str, tuple[float, float]],
    start: int | Path | None,
    say: Say,
) -> Voxels:
    """The voxels of the mask, with known maps and with what there is to start from."""
    described = {name: model.parameters[model.index(name)] for name in known}
    x = volume.data[mask]
    paths = {name: value for name, value in known.items() if isinstance(value, Path)}
    read = read_known(
        paths, [described[name] for name in paths], bounds, mask, whose="of the fit", say=say
    )[mask]
    fixed = dict(zip(paths, read.T, strict=True))
    values = {name: value for name, value in known.items() if not isinstance(value, Path)}
    told = {name: np.full(len(x), value) for name, value in values.items()} | fixed
    estimates: dict[str, NDArray[np.float64]] = {}
    if isinstance(start, Path) and not (start / "experiment.toml").exists():
        names = [name for name in model.names if (start / f"{name}.nii.gz").exists()]
        if not names:
            raise ExperimentError(
                f"expected maps of {', '.join(model.names)} to start from in {start}; there is "
                "none. Map the images first, or give a number of starts."
            )
        earlier = files.read_maps(start, names).maps.values
        _require_same_space(earlier.shape[:3], mask.shape, start)
        estimates = {name: earlier[..., e][mask] for e, name in enumerate(names)}
    elif isinstance(start, Path):
        estimates = _network_estimates(open_run(start), x, told, noise_std, basis)
    elif start is None and (run.network / "card.json").exists():
        unknown = [n for n in run.experiment.training.inputs if n not in told]
        if unknown:
            say(f"not started from the run's network, which must be told {', '.join(unknown)}")
        else:
            estimates = _network_estimates(run, x, told, noise_std, basis)
    return Voxels(x, fixed, estimates)


def _network_estimates(
    run: Run,
    x: NDArray[np.complex64],
    told: Mapping[str, NDArray[np.float64]],
    noise_std: float | None,
    basis: Basis,
) -> dict[str, NDArray[np.float64]]:
    """What a run's network makes of the voxels."""
    network, card = mapping.load_network(run)
    if card["basis_sha256"] != basis.digest:
        raise mapping.BasisMismatchError(
            f"expected a network of the basis {basis.digest[:12]}... to start from; "
            f"{run.network} has {card['basis_sha256'][:12]}.... Start from its maps, or from a "
            "number of fingerprints."
        )
    config = train.TrainingConfig.model_validate(card["config"])
    if config.snr_input and noise_std is None:
        raise ExperimentError(
            f"expected the noise_std of the images, which {run.network} takes beside them; got "
            "none. Measure it in a region without signal, or give a number of starts."
        )
    unknown = [name for name in config.inputs if name not in told]
    if unknown:
        raise ExperimentError(
            f"expected a known {', '.join(unknown)}, which {run.network} takes beside the images; "
            "got none. Give it with --known, or give a number of starts."
        )
    inputs = np.stack([told[name] for name in config.inputs], 1) if config.inputs else np.empty(0)
    # Where σ is not given, nothing looks at it.
    std = np.nan if noise_std is None else noise_std
    extra = train.extra_inputs(config, x, inputs, noise_std=std)
    given: NDArray[np.complexfloating] = np.concatenate([x, extra.astype(x.real.dtype)], axis=-1)
    names = tuple(card["estimated"])
    found = maps.estimate_maps(
        given, as_estimator(network), names, mask=np.ones(len(x), dtype=np.bool_)
    )
    return {name: found[name] for name in names}


def _require_same_space(shape: tuple[int, ...], expected: tuple[int, ...], folder: Path) -> None:
    if shape != expected:
        raise ValueError(
            f"expected maps of the shape {expected} in {folder}, as the images have; got {shape}. "
            "Start from maps of the same images."
        )


def prior_of(run: Run, model: SignalModel, pulses: PulseTrain) -> Prior:
    """The paper's, but for what the experiment says otherwise."""
    default = paper_prior(model.names, repetition_time=pulses.repetition_time)
    return Prior({**default.distributions, **run.experiment.prior}, default.ordered)


def bounds_of(prior: Prior, model: SignalModel) -> dict[str, tuple[float, float]]:
    """Where the prior allows each parameter, within the model's bounds."""
    return {
        parameter.name: (
            max(parameter.bounds[0], prior.distributions[parameter.name].low),
            min(parameter.bounds[1], prior.distributions[parameter.name].high),
        )
        for parameter in model.parameters
    }


def normals_of(
    prior: Prior, width: float | None, unknown: set[str]
) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of the normal distributions, times a width; none if it is None.

    Raises:
        ValueError: the width is not positive, or no unknown parameter has a normal distribution.
    """
    if width is None:
        return {}
    _checks.positive("the width of the prior", width)
    normals = {
        name: (normal.mean, width * normal.std)
        for name, normal in prior.distributions.items()
        if name in unknown and isinstance(normal, TruncatedNormal)
    }
    if not normals:
        raise ValueError(
            "expected a normal distribution of an unknown parameter, to weigh in; the prior of "
            f"{', '.join(sorted(unknown))} is uniform, and limits the fit anyway. Leave the prior "
            "out."
        )
    return normals


def steps_of(
    prior: Prior, unknown: set[str], widths: Sequence[float] = TWO_STEPS
) -> list[dict[str, float]]:
    """Standard deviations by name that damp each step: those of the prior, times a width.

    Of a normal distribution its own, whatever the limits; of a uniform one (high - low)/√12.
    """
    spread = {
        name: one.std
        if isinstance(one, TruncatedNormal)
        else (one.high - one.low) / float(np.sqrt(12.0))
        for name, one in prior.distributions.items()
        if name in unknown
    }
    return [{name: width * std for name, std in spread.items()} for width in widths]
