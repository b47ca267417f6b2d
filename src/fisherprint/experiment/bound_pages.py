"""What trains can see: their bounds, and the page that shows them."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fisherprint import bounds, files, report, sequence
from fisherprint.experiment import schema, tissues
from fisherprint.experiment.folder import versions
from fisherprint.fisher import SCALE, SingularInformationError
from fisherprint.models import SignalModel, SinglePool, TwoPool
from fisherprint.models.lineshape import MAX_ANGLE
from fisherprint.parameters import Parameter, paper_prior
from fisherprint.sequence import PulseTrain
from fisherprint.subspace import Basis, Method

BUNDLED = "bundled"
TRAIN_SUFFIXES = (".toml", ".h5", ".hdf5", ".mat", ".seq")

# Pairs of parameters to map over, x and y: as far as a model has them, the first two pairs.
_PAIRS = (("T1", "T2f"), ("m0s", "T1"), ("T1f", "T2f"), ("m0s", "T1f"), ("T1", "T2"))
# Ranges of the maps in SI units, nearly those of the paper's second data set (§2.4). At m0s = 0
# itself the semi-solid pool's parameters are no unknowns, and the bounds of the others jump.
_RANGES = {
    "m0s": (0.01, 0.25),
    "T1": (0.64, 2.0),
    "T1f": (1.0, 3.0),
    "T2": (30e-3, 150e-3),
    "T2f": (30e-3, 150e-3),
}
_GRID = 24
_SWEEP = 481
_B1 = (0.7, 1.3)
# Whose magnetization is drawn.
_DRAWN = ("white matter", "grey matter", "CSF")

Trains = Mapping[str, PulseTrain]
Models = Mapping[str, SignalModel]


@dataclass(frozen=True)
class Question:
    """What is asked of trains.

    Attributes:
        tissues: of `tissues.NAMES`.
        parameters: of the model, as in [model] of EXPERIMENT.toml.
        known: those that are no unknowns.
        b0: off-resonances at which each tissue is looked at, in rad/s.
        b1: relative B1, likewise.
        snr: |M0|/σ of one cycle.
        scan_time: in s; that of the longest cycle if None.
        rank: K, if the bounds of K coefficients are wanted, too.
        basis_method: of `subspace.fit`, for their basis.
        seed: of the fingerprints whose basis that is.

    Raises:
        ValueError: a CRB-SVD basis without a rank.
    """

    tissues: tuple[str, ...] = ("white matter", "grey matter", tissues.PRIOR)
    parameters: tuple[str, ...] = schema.ModelSection().parameters
    known: tuple[str, ...] = ()
    b0: tuple[float, ...] = (0.0,)
    b1: tuple[float, ...] = (1.0,)
    snr: float = 50.0
    scan_time: float | None = None
    rank: int | None = None
    basis_method: Method = "svd"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank is None and self.basis_method != "svd":
            raise ValueError(
                f"expected a rank for the basis method {self.basis_method!r}; got none. Give the "
                "number of coefficients, or leave the method out."
            )


def read_trains(
    paths: Sequence[Path], *, repetition_time: float | None = None
) -> dict[str, PulseTrain]:
    """Trains by label: the stem of the file's name, or the path where stems are the same.

    Args:
        paths: files of trains; `bundled` is the one that comes with the package.
        repetition_time: TR in s of the `.mat` files, which hold none.

    Raises:
        ValueError: a file that comes twice, a repetition time without a `.mat` file to need it,
            or as for `PulseTrain.read`.
        UnreadableFileError: as for `PulseTrain.read`.
    """
    if len(set(paths)) < len(paths):
        raise ValueError("expected different trains; got one twice. Leave it out.")
    needing = [path for path in paths if path.suffix.lower() == ".mat"]
    if repetition_time is not None and not needing:
        raise ValueError(
            "expected a repetition time for .mat files alone, as others hold their own; got no "
            ".mat file. Leave it out."
        )
    stems = [path.stem for path in paths]
    trains = {}
    for path in paths:
        label = path.stem if stems.count(path.stem) == 1 else str(path)
        own = repetition_time if path in needing else None
        trains[label] = (
            sequence.bundled()
            if path == Path(BUNDLED)
            else PulseTrain.read(path, repetition_time=own)
        )
    return trains


def models_of(trains: Trains, question: Question) -> dict[str, SignalModel]:
    """The asked model of each train."""
    section = schema.ModelSection(parameters=question.parameters)
    return {label: schema.signal_model(section, train) for label, train in trains.items()}


def bases_of(trains: Trains, models: Models, question: Question) -> dict[str, Basis] | None:
    """Each train's own basis, of fingerprints drawn from the paper's prior; None if not asked."""
    if question.rank is None:
        return None
    return {
        label: bounds.fit_basis(
            model,
            paper_prior(model.names, repetition_time=trains[label].repetition_time),
            rank=question.rank,
            method=question.basis_method,
            rng=np.random.default_rng(question.seed),
        )
        for label, model in models.items()
    }


def bound_table(
    trains: Trains,
    question: Question,
    *,
    models: Models | None = None,
    bases: Mapping[str, Basis] | None = None,
) -> bounds.BoundTable:
    """√CRB of the asked tissues for each train.

    Args:
        trains: by label.
        question: what is asked of them.
        models: of the trains; the asked ones if None.
        bases: of the trains' coefficients; with neither models nor bases the asked ones.

    Raises:
        KeyError: an unknown tissue or parameter.
        SingularInformationError: a parameter that no train sees in any tissue.
        ValueError: as for `bounds.table`.
    """
    if models is None:
        models = models_of(trains, question)
        bases = bases_of(trains, models, question)
    return bounds.table(
        models,
        _samples(question, next(iter(models.values()))),
        durations={label: train.duration for label, train in trains.items()},
        snr=question.snr,
        scan_time=question.scan_time,
        known=question.known,
        bases=bases,
        basis_method=None if question.rank is None else question.basis_method,
    )


def _samples(question: Question, model: SignalModel) -> dict[str, NDArray[np.float64]]:
    """θ of each tissue at each B0 and B1; the label says which where there are several."""
    samples = {}
    for name, b0, b1 in itertools.product(question.tissues, question.b0, question.b1):
        theta = tissues.tissue(name, model.names)
        label = [name]
        for field, value, given, unit in (
            ("B0", b0, question.b0, " rad/s"),
            ("B1", b1, question.b1, ""),
        ):
            theta[model.index(field)] = value
            if given != getattr(Question, field.lower()):
                label.append(f"{field} {value:g}{unit}")
        samples[", ".join(label)] = theta
    return samples


def write_bounds_csv(path: Path, table: bounds.BoundTable, trains: Trains) -> None:
    """A row for each number, SI units; what is not seen has an empty place for it.

    Args:
        path: replaced whole or not at all.
        table: of the trains.
        trains: by label.
    """
    text = io.StringIO()
    records = [
        record | {"train_sha256": trains[record["train"]].digest} for record in table.records()
    ]
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    files.write_text(path, text.getvalue())


def write_bounds_json(path: Path, table: bounds.BoundTable, trains: Trains) -> None:
    """The same with the trains and what was asked; null for what is not seen."""
    content = {
        "snr": table.snr,
        "scan_time_s": table.scan_time,
        "unknown": [*(parameter.name for parameter in table.parameters), *SCALE],
        "known": list(table.known),
        "trains": {
            label: {
                "sha256": train.digest,
                "cycle_s": train.duration,
                "cycles": cycles,
                "rf_power_rad2_per_s2": train.rf_power,
            }
            for (label, train), cycles in zip(trains.items(), table.cycles, strict=True)
        },
        "bounds": table.records(),
        "versions": versions(),
    }
    files.write_json(path, content)


def train_page(trains: Trains, question: Question | None = None) -> str:
    """One HTML page of trains side by side: pulses, bounds, magnetization, maps.

    Args:
        trains: by label; all are compared with the first.
        question: what is asked of them; if None, what its defaults say.

    Raises:
        KeyError: an unknown tissue or parameter.
        ValueError: as for `bounds.table`.
    """
    question = Question() if question is None else question
    models = models_of(trains, question)
    bases = bases_of(trains, models, question)
    sections = [
        train_section(trains),
        *magnetization_sections(trains, models),
        *bound_sections(trains, models, question, bases=bases),
    ]
    facts = [
        f"{label}: {train.n_samples} pulses in {len(train.flip_angle)} train(s), "
        f"{train.duration:.3g} s a cycle, TR {1e3 * train.repetition_time:g} ms."
        for label, train in trains.items()
    ]
    provenance: dict[str, object] = {
        f"{key} asked": value for key, value in asdict(question).items() if value not in (None, ())
    }
    provenance |= {f"{label} SHA-256": train.digest for label, train in trains.items()}
    title = "What trains can see" if len(trains) > 1 else f"What {next(iter(trains))} can see"
    return report.page(title, "\n\n".join(facts), sections, provenance=provenance | versions())


def train_section(trains: Trains) -> report.Section:
    """Pulses of trains."""
    caption = (
        "Flip angle, duration and radio-frequency power of each pulse; the triangle is the "
        "inversion. The power is ω1² averaged over the repetition."
    )
    heading = "Pulse train" if len(trains) == 1 else "Pulse trains"
    return report.Section(heading, caption, report.draw_trains(trains))


def magnetization_sections(trains: Trains, models: Models) -> list[report.Section]:
    """What the pulses make of the magnetization, for models that tell."""
    drawn: list[Figure | str] = []
    for label, model in models.items():
        if isinstance(model, TwoPool | SinglePool):
            drawn += [f"<h3>{escape(label)}</h3>"] if len(models) > 1 else []
            drawn.append(report.magnetization(trains[label], _states(model)))
    if not drawn:
        return []
    caption = (
        "Magnetization at the echoes of the periodic state, in units of that of both pools in "
        "equilibrium, at B0 = 0 and B1 = 1. A line that fills a band alternates from echo to echo."
    )
    return [report.Section("Magnetization", caption, drawn)]


def _states(model: TwoPool | SinglePool) -> dict[str, NDArray[np.float64]]:
    theta = np.array([tissues.tissue(name, model.names) for name in _DRAWN])
    return dict(zip(_DRAWN, model.magnetization(theta), strict=True))


def bound_sections(
    trains: Trains,
    models: Models,
    question: Question,
    *,
    bases: Mapping[str, Basis] | None = None,
    shown: Sequence[Parameter] | None = None,
) -> list[report.Section]:
    """Table, maps, and what B0 and B1 do: of the coefficients where there are bases.

    Args:
        trains: by label.
        models: of the trains.
        question: what is asked of them.
        bases: of the trains' coefficients.
        shown: parameters of maps and curves; all unknown ones if None.
    """
    try:
        table = bound_table(trains, question, models=models, bases=bases)
    except SingularInformationError as error:
        return [report.Section("Bounds", f"No table, maps or curves: {error}", "")]
    what = "signal" if table.rank is None else f"{table.rank} coefficients"
    terms = f"of the {what}, at SNR {table.snr:g} and a scan of {table.scan_time:.3g} s"
    others = "the others at the centre of the paper's prior"
    sections = [
        report.Section(
            "Bounds",
            "The least standard deviation of an unbiased estimate of each parameter (√CRB).",
            report.bounds_table(table),
        )
    ]
    model = next(iter(models.values()))
    noise = {
        label: bounds.scan_noise(snr=table.snr, scan_time=table.scan_time, duration=train.duration)
        for label, train in trains.items()
    }
    pairs = [pair for pair in _PAIRS if set(pair) <= set(model.names)][:2]
    figures = []
    for x, y in pairs:
        maps = {
            label: bounds.bound_map(
                each,
                tissues.tissue(tissues.PRIOR, each.names),
                (x, np.linspace(*_RANGES[x], _GRID)),
                (y, np.linspace(*_RANGES[y], _GRID)),
                known=question.known,
                basis=None if bases is None else bases[label],
                noise_std=noise[label],
            )
            for label, each in models.items()
        }
        figures.append(report.bound_maps(maps, shown))
    if figures:
        over = " and ".join(f"{x} and {y}" for x, y in pairs)
        caption = f"√CRB {terms}, over {over}, {others}. Dark is good."
        sections.append(report.Section("Bound maps", caption, figures))
    sweeps = {
        label: [
            bounds.sweep(
                each,
                tissues.tissue(tissues.PRIOR, each.names),
                along,
                known=question.known,
                basis=None if bases is None else bases[label],
                noise_std=noise[label],
            )
            for along in _fields(trains)
        ]
        for label, each in models.items()
    }
    caption = (
        f"√CRB {terms}, against off-resonance ω0 and relative B1, {others}. Off-resonance is "
        "shown over the period of the signal, ±π/TR."
    )
    figure = report.bounds_against(sweeps, shown)
    return [*sections, report.Section("Bounds against B0 and B1", caption, figure)]


def _fields(trains: Trains) -> list[tuple[str, NDArray[np.float64]]]:
    """Values of B0, over the longest period of any train, and of B1, as far as the model goes."""
    period = max(np.pi / train.repetition_time for train in trains.values())
    largest = max(float(np.abs(train.flip_angle).max()) for train in trains.values())
    return [
        ("B0", np.linspace(-period, period, _SWEEP)),
        ("B1", np.linspace(_B1[0], min(_B1[1], MAX_ANGLE / largest), _SWEEP)),
    ]
