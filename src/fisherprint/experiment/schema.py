"""The schema of EXPERIMENT.toml, for the command line and for Python alike."""

from __future__ import annotations

from collections.abc import Callable, Collection
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from fisherprint import _checks, files, sequence, train
from fisherprint.inference import Precision
from fisherprint.models import SinglePool, TwoPool
from fisherprint.models.cycle import Saturation
from fisherprint.models.protocol import PulsedModel, SignalModel
from fisherprint.parameters import Prior, TruncatedNormal, Uniform, paper_prior
from fisherprint.sequence import Inversion, PulseTrain
from fisherprint.subspace import Basis, CrbSvd, Method

# Coefficients, as in the paper (§2.4).
DEFAULT_RANK = 13

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Table(BaseModel):
    """A table of a TOML file: frozen, and an unknown name is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SequenceSection(Table):
    """The pulse train; without a path, the one that comes with the package."""

    path: Path | None = Field(None, description=".mat (keys alpha, TRF), .h5 or .toml")
    repetition_time: Positive | None = Field(None, description="TR in s")
    inversion: Inversion | None = Field(None, description="crushed or spoiled")
    phase_increment: float | None = Field(None, description="from pulse to pulse, in rad; else π")

    @model_validator(mode="after")
    def _describe_a_file(self) -> SequenceSection:
        own = (self.repetition_time, self.inversion, self.phase_increment)
        if self.path is None and any(value is not None for value in own):
            raise ValueError(
                "expected a path with repetition_time, inversion or phase_increment; got none, "
                "and the bundled train has its own. Name a file, or drop them."
            )
        return self


class ModelSection(Table):
    """The two-pool model, or with the parameters T1, T2, B0 and B1 a single pool."""

    parameters: tuple[str, ...] = Field(
        ("m0s", "T1", "T2f", "Rx", "T2s", "B0", "B1"),
        description="all that enter the Fisher matrix, with T1 or with T1f and T1s",
    )
    saturation: Saturation = Field(
        "linearized",
        description="of the semi-solid pool: linearized, graham or generalized Bloch",
    )

    @property
    def is_single_pool(self) -> bool:
        """Whether there is no semi-solid pool."""
        return "m0s" not in self.parameters and "T2" in self.parameters

    @model_validator(mode="after")
    def _saturate_what_is_there(self) -> ModelSection:
        if self.is_single_pool and self.saturation != "linearized":
            raise ValueError(
                f"expected no saturation of a pool that is not there; got {self.saturation!r}. "
                "Drop it, or add m0s, T2f, Rx and T2s to the parameters."
            )
        return self


class SimulationSection(Table):
    """The data set."""

    training: int = Field(92160, ge=1, description="fingerprints to train with")
    validation: int = Field(10240, ge=1, description="fingerprints to watch the training with")
    test: int = Field(9056, ge=1, description="fingerprints that the training never sees")
    rank: int | None = Field(None, ge=2, description="K of the basis; 13 if not given")
    basis_method: Method = Field(
        "svd",
        description="svd, or crb-svd: it holds what the signals tell, not their energy alone",
    )
    basis_weight: float | None = Field(
        None, ge=0, le=1, description="of the derivatives in a crb-svd; 0.5 if not given"
    )
    basis: Path | None = Field(None, description="file of a given basis, instead of the SVD's")
    basis_key: str | None = Field(None, description="its key")
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _one_basis(self) -> SimulationSection:
        if (self.basis is None) != (self.basis_key is None) or (self.basis and self.rank):
            raise ValueError(
                "expected a rank, or a basis with its basis_key; got "
                f"rank {self.rank}, basis {self.basis} and basis_key {self.basis_key}. "
                "A given basis has a rank of its own."
            )
        if self.basis and (self.basis_method != "svd" or self.basis_weight is not None):
            raise ValueError(
                "expected a given basis, or a basis_method with its basis_weight; got "
                f"basis {self.basis}, {self.basis_method} and {self.basis_weight}. Drop one."
            )
        if self.basis_method == "svd" and self.basis_weight is not None:
            raise ValueError(
                'expected a basis_weight for basis_method = "crb-svd" alone; got '
                f"{self.basis_weight} for svd. Change the method, or drop the weight."
            )
        return self


class TrainingSection(train.TrainingConfig):
    """How the network is trained, and what from."""

    start: Path | None = Field(
        None, description="run or network folder whose weights the training starts from"
    )

    @property
    def config(self) -> train.TrainingConfig:
        """All but the start."""
        return train.TrainingConfig(**self.model_dump(exclude={"start"}))


class EvaluationSection(Table):
    """The audit against the bound."""

    snr: tuple[Positive, ...] = Field(
        (5, 10, 20, 50, 100, 200), min_length=1, description="values of SNRmax"
    )
    n_noise: int = Field(300, ge=2, description="noise realizations of each fingerprint")
    fingerprints: int = Field(1000, ge=1, description="test fingerprints used, at most")
    seed: int = Field(1, ge=0)


class MapSection(Table):
    """Coefficient images to map."""

    coefficients: Path = Field(description=".nii(.gz), .cfl, .npy, .mat or .h5")
    key: str | None = Field(None, description="of the images in .mat and .h5")
    mask: Path | None = Field(
        None, description="in any format of the coefficients; else mask_key, else automatic"
    )
    mask_key: str | None = Field(
        None, description="of the mask in a .mat or .h5: that of the mask, else the coefficients'"
    )
    noise_std: Positive | None = Field(
        None,
        description="σ of their real and imaginary part each; else from the background or the "
        "residuals, but [training] snr_input needs it",
    )
    errors: bool = Field(True, description="error bars, M0 and the misfit beside the estimates")
    precision: Precision | None = Field(
        None,
        description="of the widest products, float32 or bfloat16; else what is faster here",
    )
    known: dict[str, Path] = Field(
        {},
        description="maps of [training] inputs by parameter, SI units (B0 in rad/s, B1 relative), "
        "in any format of the coefficients; in .mat and .h5 under the parameter's name",
    )
    basis: Path | None = Field(None, description="of the images, to compare with the network's")
    basis_key: str | None = Field(None, description="its key")
    quarter_turns: int = Field(
        0, description="of the report's pictures, counter-clockwise, where no affine tells"
    )
    ranges: dict[str, tuple[float, float]] = Field(
        {}, description="limits of the report's colours by parameter, SI units"
    )

    @model_validator(mode="after")
    def _options_do_something(self) -> MapSection:
        if (self.basis is None) != (self.basis_key is None):
            raise ValueError(
                f"expected a basis with its basis_key; got basis {self.basis} and basis_key "
                f"{self.basis_key}. Name both, or drop both."
            )
        for name, (low, high) in self.ranges.items():
            if not low < high:
                raise ValueError(
                    f"expected the range of {name} as [low, high]; got [{low:g}, {high:g}]. "
                    "Swap or correct them."
                )
        return self


class BrainSection(Table):
    """The digital brain, from the tissue maps that ship with nilearn."""

    snr: Positive = Field(50.0, description="SNRmax where |M0| = 1")
    voxel_size: Positive = Field(2.0, description="mm")
    errors: bool = Field(False, description="error bars as well, which take longer than the maps")
    seed: int = Field(2, ge=0)


class Experiment(Table):
    """One schema for EXPERIMENT.toml, the command line and Python."""

    title: str = "Fisherprint experiment"
    data: Path = Field(Path(), description="folder of the paths below, from this file")
    sequence: SequenceSection = SequenceSection()
    model: ModelSection = ModelSection()
    prior: dict[str, TruncatedNormal | Uniform] = Field(
        {}, description="distributions that replace the paper's"
    )
    simulation: SimulationSection = SimulationSection()
    training: TrainingSection = TrainingSection()
    evaluation: EvaluationSection = EvaluationSection()
    map: MapSection | None = None
    brain: BrainSection | None = None

    @model_validator(mode="after")
    def _names_exist(self) -> Experiment:
        for name in (*self.training.estimated, *self.training.inputs, *self.prior):
            if name not in self.model.parameters:
                raise ValueError(
                    f"expected parameters of the model, {', '.join(self.model.parameters)}; "
                    f"got {name!r}. Correct the name, or [model] parameters."
                )
        for name in () if self.map is None else self.map.ranges:
            if name not in self.training.estimated:
                raise ValueError(
                    "expected ranges of parameters that are estimated, "
                    f"{', '.join(self.training.estimated)}; got {name!r}. Correct the name, or "
                    "[training] estimated."
                )
        if self.map is not None:
            require_maps("[training] inputs", self.training.inputs, self.map.known)
        if self.map is not None and self.map.noise_std is None and self.training.snr_input:
            raise ValueError(
                "expected [map] noise_std with [training] snr_input; got None and snr_input = "
                "True. Measure it in a region without signal, or drop snr_input."
            )
        if self.map is not None and self.brain is not None:
            raise ValueError("expected [map] or [brain]; got both. Keep one.")
        return self


def require_maps(whose: str, inputs: Collection[str], known: Collection[str]) -> None:
    """Require a map of each input of a network, and of nothing else; else ValueError."""
    missing = [name for name in inputs if name not in known]
    superfluous = [name for name in known if name not in inputs]
    if missing or superfluous:
        raise ValueError(
            f"expected known maps of {whose}, {_checks.listing(inputs)}; missing are "
            f"{_checks.listing(missing)}, superfluous are {_checks.listing(superfluous)}. Add or "
            "drop them in [map] known, or by --known NAME=FILE."
        )


class ExperimentError(ValueError):
    """An experiment file or run folder that is not what it must be."""


def read(path: Path | None, *, data: Path | None = None) -> Experiment:
    """Read and check EXPERIMENT.toml; None stands for the demo that comes with the package.

    Args:
        path: the file. Its `data`, and the paths that it names, become absolute.
        data: folder to use in place of the file's `data`.

    Raises:
        UnreadableFileError: no such file, or not TOML.
        ExperimentError: the contents do not fit the schema; the message names each field.
    """
    if path is None:
        with resources.as_file(resources.files("fisherprint") / "demo.toml") as demo:
            content, where = files.read_toml(demo), Path()
    else:
        content, where = files.read_toml(path), path.parent
    try:
        experiment = Experiment.model_validate(content)
    except ValidationError as error:
        raise ExperimentError(f"{path}: {explained(error)}") from error
    folder = (where / experiment.data if data is None else data).resolve()
    return absolute(experiment.model_copy(update={"data": folder}), folder)


def absolute(experiment: Experiment, folder: Path) -> Experiment:
    """The experiment with relative paths but `data` taken from a folder."""
    return _moved(experiment, lambda path: folder / path)


def explained(error: ValidationError) -> str:
    """What is wrong with a file, one line for each field that does not fit."""
    lines = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"]) or "(top level)"
        if item["type"] == "value_error":  # ours, which says what it got
            lines.append(f"{field}: {item['msg'].removeprefix('Value error, ')}")
            continue
        unknown = item["type"] == "extra_forbidden"
        hint = " (an unknown name; check its spelling)" if unknown else ""
        lines.append(f"{field}: {item['msg']}{hint}; got {item['input']!r}")
    return "expected another content; correct these fields:\n  " + "\n  ".join(lines)


# Where an experiment names files.
_MAP_PATHS = ("coefficients", "mask", "basis")
_PATHS = {
    "sequence": ("path",),
    "simulation": ("basis",),
    "training": ("start",),
    "map": _MAP_PATHS,
}


def _moved(experiment: Experiment, move: Callable[[Path], Path]) -> Experiment:
    """The experiment with each path but `data` replaced."""
    sections: dict[str, BaseModel] = {}
    for name, fields in _PATHS.items():
        section = getattr(experiment, name)
        if section is not None:
            paths = {field: getattr(section, field) for field in fields}
            sections[name] = section.model_copy(
                update={field: move(path) for field, path in paths.items() if path is not None}
            )
    if isinstance(section := sections.get("map"), MapSection):
        known = {name: move(path) for name, path in section.known.items()}
        sections["map"] = section.model_copy(update={"known": known})
    return experiment.model_copy(update=sections)


def shareable(experiment: Experiment) -> dict[str, Any]:
    """The experiment as TOML can hold it, without the names of folders of this machine.

    Paths are relative to `data`, which is left out; of a file elsewhere there is the name alone.
    """
    data = experiment.data

    def relative(path: Path) -> Path:
        return path.relative_to(data) if path.is_relative_to(data) else Path(path.name)

    return _moved(experiment, relative).model_dump(
        mode="json", exclude_none=True, exclude={"data"}
    )


def network_folder(start: Path) -> Path:
    """Where the network of a run or network folder lies.

    Raises:
        ExperimentError: there is none.
    """
    for folder in (start, start / "network"):
        if (folder / "card.json").exists():
            return folder
    raise ExperimentError(
        f"expected a trained network to start from in {start}; there is none. Train it first, or "
        "correct [training] start."
    )


class Inputs(NamedTuple):
    """What an experiment simulates with.

    Attributes:
        train: the pulse train.
        model: the signal model of it.
        prior: the paper's, with the experiment's replacements.
        basis: the given basis, the rank of the SVD basis to be made, or what a CRB-SVD basis
            shall be.
    """

    train: PulseTrain
    model: SignalModel
    prior: Prior
    basis: Basis | int | CrbSvd


def model(experiment: Experiment, train: PulseTrain) -> SignalModel:
    """The signal model of an experiment: nothing else in the stages knows which one it is."""
    return signal_model(experiment.model, train)


def signal_model(section: ModelSection, train: PulseTrain) -> PulsedModel:
    """The model that a section describes, of a train."""
    if section.is_single_pool:
        return SinglePool(train, section.parameters)
    return TwoPool(train, section.parameters, saturation=section.saturation)


def inputs(experiment: Experiment) -> Inputs:
    """Train, model, prior, and a basis or its rank; of what comes later, that it is there.

    Raises:
        UnreadableFileError: a file that the experiment names is missing, damaged or foreign.
        ExperimentError: there is no network to start from.
        ModuleNotFoundError: a digital brain without nilearn.
        ValueError: its contents are no pulse train, or no basis of it.
    """
    section = experiment.sequence
    train = sequence.bundled()
    if section.path is not None:
        train = PulseTrain.read(
            section.path,
            repetition_time=section.repetition_time,
            inversion=section.inversion,
            phase_increment=section.phase_increment,
        )
    # These are read hours later.
    if experiment.training.start is not None:
        network_folder(experiment.training.start)
    if experiment.brain is not None:
        files.read_tissue_maps()
    if experiment.map is not None:
        named = (getattr(experiment.map, field) for field in _MAP_PATHS)
        for path in (*named, *experiment.map.known.values()):
            if path is not None:
                files.require_file(path)
    signal_model = model(experiment, train)
    default = paper_prior(signal_model.names, repetition_time=train.repetition_time)
    prior = Prior({**default.distributions, **experiment.prior}, default.ordered)
    simulation = experiment.simulation
    rank = simulation.rank or DEFAULT_RANK
    basis: Basis | int | CrbSvd = rank
    if simulation.basis_method == "crb-svd":
        weight = simulation.basis_weight
        basis = CrbSvd(rank) if weight is None else CrbSvd(rank, weight)
    if simulation.basis is not None and simulation.basis_key is not None:
        basis = files.read_basis(
            simulation.basis, key=simulation.basis_key, n_samples=train.n_samples
        )
    return Inputs(train, signal_model, prior, basis)
