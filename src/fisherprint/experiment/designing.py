"""The schema of DESIGN.toml, and the search that it asks for, resumable, beside its train."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator

from fisherprint import _checks, design, files
from fisherprint.experiment import tissues
from fisherprint.experiment.schema import (
    ExperimentError,
    ModelSection,
    Positive,
    Table,
    explained,
    signal_model,
)
from fisherprint.models.protocol import PulsedModel
from fisherprint.parameters import Prior, paper_prior
from fisherprint.sequence import Inversion, PulseTrain

_Range = tuple[float, float]


class StartSection(Table):
    """Where the search starts: a train from a file, or a smooth random one."""

    path: Path | None = Field(None, description=".toml, .h5, .mat or .seq")
    repetition_time: Positive | None = Field(None, description="TR in s; 3.5e-3 if random")
    inversion: Inversion | None = Field(None, description="crushed or spoiled; crushed if random")
    pulses: int | None = Field(None, ge=12, description="of a random start; 1142 if not given")
    inversion_duration: Positive | None = Field(
        None, description="of a random start in s; 500e-6 if not given"
    )
    seed: int | None = Field(None, ge=0, description="of a random start; 0 if not given")

    @model_validator(mode="after")
    def _one_kind(self) -> StartSection:
        own = (self.pulses, self.inversion_duration, self.seed)
        if self.path is not None and any(value is not None for value in own):
            raise ValueError(
                "expected a path, or pulses, inversion_duration and seed of a random start; got "
                "both. A train from a file has its own: drop one kind."
            )
        return self


class GoalSection(Table):
    """What the train shall see: the weighted sum of √CRB/θ over parameters, mean over tissues."""

    weights: dict[str, Positive] = Field(
        {"m0s": 1.0, "T1": 1.0, "T2f": 1.0}, min_length=1, description="by parameter"
    )
    tissues: tuple[str, ...] = Field(
        ("white matter", "grey matter", "prior"),
        min_length=1,
        description="names of tissues, or of tables in [tissue]",
    )
    B0: tuple[float, ...] = Field((0.0,), min_length=1, description="rad/s, each with each B1")
    B1: tuple[Positive, ...] = Field((1.0,), min_length=1, description="relative")
    drawn: int = Field(0, ge=0, description="further tissues, drawn from the prior")
    drawn_share: float | None = Field(
        None, gt=0, lt=1, description="of the cost for these; 0.5 if not given"
    )
    drawn_snr: Positive | None = Field(
        None,
        description="|M0|/σ at which the spread of the prior counts as known; 50 if not given",
    )
    known: tuple[str, ...] = Field((), description="parameters that need not be estimated")
    phase_known: bool = Field(False, description="whether M0 is real, its size alone unknown")
    rank: int | None = Field(
        None, ge=2, description="bound of as many coefficients; else of the whole signal"
    )
    signal_share: float = Field(
        0.0, ge=0, lt=1, description="with a rank, the whole signal's share of the cost"
    )
    fingerprints: int | None = Field(
        None, ge=2, description="drawn from the prior for the basis; 256 if not given"
    )
    seed: int | None = Field(None, ge=0, description="of all draws; 0 if not given")

    @model_validator(mode="after")
    def _drawn_options(self) -> GoalSection:
        if self.drawn == 0 and not (self.drawn_share is None and self.drawn_snr is None):
            raise ValueError(
                "expected a number of drawn tissues with drawn_share or drawn_snr; got none. Give "
                "drawn, or drop them."
            )
        return self

    @model_validator(mode="after")
    def _basis_options(self) -> GoalSection:
        if self.rank is None and not (self.fingerprints is None and self.signal_share == 0):
            raise ValueError(
                "expected a rank with fingerprints or signal_share; got none. Give one, or "
                "drop them: the whole signal needs no basis."
            )
        if self.rank is None and self.drawn == 0 and self.seed is not None:
            raise ValueError(
                "expected something to draw with a seed: a rank, or drawn; got neither. Give one, "
                "or drop the seed."
            )
        return self


class LimitsSection(Table):
    """Limits of the train, SI units; `design.Limits` tells which of them are hard."""

    flip_angle: _Range = Field((0.0, float(np.pi)), description="rad; hard")
    pulse_duration: _Range = Field((100e-6, 500e-6), description="s; hard")
    rf_power: Positive | None = Field(None, description="mean ω1² in (rad/s)²")
    peak_b1: Positive | None = Field(None, description="ω1 in rad/s")
    flip_angle_change: Positive | None = Field(None, description="from pulse to pulse, rad")
    flip_angle_roughness: Positive | None = Field(
        None, description="root mean square of the second difference, rad"
    )
    pulse_duration_change: Positive | None = Field(None, description="from pulse to pulse, s")
    raster: Positive = Field(1e-6, description="of the durations, s")


class SearchSection(Table):
    """How long and how finely to search."""

    rounds: int = Field(60, ge=1, description="of L-BFGS, with an update of the penalties after")
    iterations: int = Field(40, ge=1, description="of L-BFGS in a round")
    knots: tuple[int, ...] = Field(
        (0,),
        min_length=1,
        description="splines along the train by round, the last for the rest; 0: every pulse",
    )


class Design(Table):
    """One schema for DESIGN.toml, the command line and Python."""

    title: str = "Pulse train"
    start: StartSection = StartSection()
    model: ModelSection = ModelSection()
    goal: GoalSection = GoalSection()
    tissue: dict[str, dict[str, float]] = Field(
        {}, description="own tissues: parameters by name, SI units; B0 and B1 are in [goal]"
    )
    limits: LimitsSection = LimitsSection()
    search: SearchSection = SearchSection()

    @model_validator(mode="after")
    def _names_exist(self) -> Design:
        for name in (*self.goal.weights, *self.goal.known):
            if name not in self.model.parameters:
                raise ValueError(
                    f"expected parameters of the model, {', '.join(self.model.parameters)}; "
                    f"got {name!r}. Correct the name, or [model] parameters."
                )
        needed = {name for name in self.model.parameters if name not in ("B0", "B1")}
        for label, values in self.tissue.items():
            if set(values) != needed:
                raise ValueError(
                    f"expected {', '.join(sorted(needed))} of the tissue {label!r}; got "
                    f"{', '.join(sorted(values)) or 'nothing'}. Give each of them once."
                )
        for label in self.goal.tissues:
            if label not in (*tissues.NAMES, *self.tissue):
                raise ValueError(
                    f"expected tissues of {', '.join((*tissues.NAMES, *self.tissue))}; got "
                    f"{label!r}. Correct the name, or describe it in [tissue.{label!r}]."
                )
        return self


def read_design(path: Path) -> Design:
    """Read and check DESIGN.toml; the start's path becomes absolute.

    Raises:
        UnreadableFileError: no such file, or not TOML.
        ExperimentError: the contents do not fit the schema; the message names each field.
    """
    content = files.read_toml(path)
    try:
        wanted = Design.model_validate(content)
    except ValidationError as error:
        raise ExperimentError(f"{path}: {explained(error)}") from error
    if wanted.start.path is None:
        return wanted
    start = wanted.start.model_copy(update={"path": (path.parent / wanted.start.path).resolve()})
    return wanted.model_copy(update={"start": start})


def theta(wanted: Design) -> NDArray[np.float64]:
    """The tissues of a design, each at each B0 and B1, shape (S, P)."""
    names = wanted.model.parameters
    rows = []
    for label in wanted.goal.tissues:
        for b0 in wanted.goal.B0:
            for b1 in wanted.goal.B1:
                own = wanted.tissue.get(label)
                if own is None:
                    row = tissues.tissue(label, names)
                else:
                    row = np.array([own.get(name, 0.0) for name in names])
                for name, value in (("B0", b0), ("B1", b1)):
                    row[_checks.index(name, names)] = value
                rows.append(row)
    return np.array(rows)


def problem(wanted: Design) -> tuple[PulsedModel, design.Goal, design.Limits]:
    """The model with the start, the goal and the limits.

    Raises:
        UnreadableFileError: the start's file is missing, damaged or foreign.
        LimitsError: limits that contradict each other, or no room for a random start.
        ValueError: the start is no pulse train.
    """
    section, goal = wanted.start, wanted.goal
    limits = design.Limits(**wanted.limits.model_dump())
    if section.path is not None:
        train = PulseTrain.read(
            section.path, repetition_time=section.repetition_time, inversion=section.inversion
        )
    else:
        train = design.random_start(
            limits,
            pulses=section.pulses or 1142,
            repetition_time=section.repetition_time or 3.5e-3,
            inversion=section.inversion or "crushed",
            inversion_duration=section.inversion_duration or 500e-6,
            rng=np.random.default_rng(section.seed or 0),
        )
    model = signal_model(wanted.model, train)
    prior = paper_prior(model.names, repetition_time=train.repetition_time)
    drawn = None
    if goal.rank is not None:
        size = goal.fingerprints or 256
        drawn = prior.sample(size, rng=np.random.default_rng(goal.seed or 0))
    counted, importance, sizes, foreknown = _counted(wanted, prior)
    aim = design.Goal(
        counted,
        goal.weights,
        importance=importance,
        sizes=sizes,
        foreknown=foreknown,
        known=goal.known,
        phase_known=goal.phase_known,
        rank=goal.rank,
        basis_theta=drawn,
        # The prior is even in B0, and with alternating phase s(-B0) is the conjugate of s(B0).
        mirrored=drawn is not None and "B0" in model.names and train.phase_increment == np.pi,
        signal_share=goal.signal_share,
    )
    return model, aim, limits


_Floats = NDArray[np.float64]


def _counted(wanted: Design, prior: Prior) -> tuple[_Floats, _Floats, _Floats, _Floats]:
    """All tissues (S, P), their importance (S,), and the sizes and foreknowledge of each (S, P).

    Of the named tissues the relative bound counts. Of those drawn from the prior it is the bound
    of van Trees, which the spread of the prior keeps finite where the train sees little, relative
    to the nominal values: a drawn m0s may be 0.
    """
    goal, named = wanted.goal, theta(wanted)
    share = 0.0 if goal.drawn == 0 else goal.drawn_share or 0.5
    drawn = prior.sample(goal.drawn, rng=np.random.default_rng([goal.seed or 0, 1]))
    spread = prior.sample(10_000, rng=np.random.default_rng([goal.seed or 0, 2])).std(axis=0)
    nominal = tissues.tissue(tissues.PRIOR, wanted.model.parameters)
    known = 1 / (spread * (goal.drawn_snr or 50.0)) ** 2
    return (
        np.concatenate([named, drawn]),
        np.r_[
            np.full(len(named), (1 - share) / len(named)),
            np.full(goal.drawn, share / max(goal.drawn, 1)),
        ],
        np.concatenate([np.abs(named), np.tile(np.abs(nominal), (goal.drawn, 1))]),
        np.concatenate([np.zeros_like(named), np.tile(known, (goal.drawn, 1))]),
    )


def design_train(
    wanted: Design,
    output: Path,
    *,
    resume: bool = False,
    force: bool = False,
    minutes: float | None = None,
    say: Callable[[str], None],
    progress: Callable[[str, int, int], None],
) -> design.Round:
    """Search for a train, and keep the best so far in `output` after each round.

    Beside the train there is a file of the search, from which `resume` goes on; it takes more
    rounds, other knots or iterations, and nothing else.

    Args:
        wanted: the design.
        output: the train, `.toml` or `.h5`.
        resume: go on from the search beside `output`.
        force: forget earlier results.
        minutes: stop after the round in which they are over; None for no such limit.
        say: gets a line of text after each round.
        progress: gets what is counted, how many are done, and of how many.

    Returns:
        The state after the last round.

    Raises:
        OutputExistsError: `output` or its search is there, without `resume` or `force`.
        ExperimentError: there is nothing to resume, it belongs to another design, or both `resume`
            and `force`.
        LimitsError: the start breaks a limit, or limits contradict each other.
        SingularInformationError: a weighted parameter that no tissue determines.
    """
    if output.suffix not in (".toml", ".h5", ".hdf5"):
        raise ValueError(f"a pulse train is written as .toml or .h5; got {output}. Change it.")
    record = output.with_name(output.stem + ".search.h5")
    asked = files.to_toml(
        wanted.model_dump(mode="json", exclude_none=True, exclude={"search", "title"})
    )
    state = None
    if resume and force:
        raise ExperimentError(
            "expected to go on or to begin anew; got both --resume and --force. Drop one."
        )
    if resume:
        if not record.exists():
            raise ExperimentError(
                f"expected a search to resume at {record}; found none. Begin one without --resume."
            )
        state, of = files.read_search(record)
        if of != asked:
            raise ExperimentError(
                f"{record} is the search of another design. Choose another output, or begin anew "
                "with --force alone."
            )
    elif not force:
        for path in (output, record):
            if path.exists():
                raise files.OutputExistsError(
                    f"{path} is already there. Go on with --resume, choose another output, or "
                    "replace it with --force."
                )
    model, goal, limits = problem(wanted)
    began = time.monotonic()
    if state is None:
        state = design.begin(model, goal, limits)
        _keep(state, asked, output, record)
    say(_line(state, wanted))
    search = wanted.search
    while state.number < search.rounds and not state.converged:
        state = next(
            design.search(
                model,
                goal,
                limits,
                state,
                knots=[n or None for n in search.knots],
                iterations=search.iterations,
                watch=_Counter(f"round {state.number + 1}, evaluations", search, progress),
            )
        )
        _keep(state, asked, output, record)
        say(_line(state, wanted))
        if minutes is not None and time.monotonic() - began > 60 * minutes:
            break
    if state.converged:
        say("converged: no control changes the cost any more")
    return state


class _Counter:
    """Progress of a round: a step of L-BFGS takes one evaluation of the cost, rarely more."""

    def __init__(
        self, what: str, search: SearchSection, progress: Callable[[str, int, int], None]
    ) -> None:
        self._what, self._total, self._progress = what, search.iterations, progress
        self._done = 0

    def __call__(self, value: float) -> None:
        self._done += 1
        self._progress(
            f"{self._what} (cost {value:.4g})", self._done, max(self._total, self._done)
        )


def _keep(state: design.Round, asked: str, output: Path, record: Path) -> None:
    """The best train first: a record without its train would be resumed in vain."""
    state.best.write(output)
    files.write_search(record, state, asked)


def _line(state: design.Round, wanted: Design) -> str:
    bounds = ", ".join(f"{name} {value:.4g}" for name, value in state.relative.items())
    kind = "the signal" if wanted.goal.rank is None else f"{wanted.goal.rank} coefficients"
    over = f"; limits exceeded by {state.excess:.1%}" if state.excess > 5e-4 else ""
    return (
        f"round {state.number}: cost {state.cost:.5g}, best within limits {state.best_cost:.5g}; "
        f"√CRB/θ of {kind}, SNR 1: {bounds}{over}"
    )
