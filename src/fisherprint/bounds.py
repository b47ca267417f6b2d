"""What a train can see: bounds of tissues, over two parameters, of trains side by side (§2.1).

All are √CRB, the least standard deviation of an unbiased estimate. Nothing here knows which model
it serves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray

from fisherprint import _checks, _threads, fisher, subspace
from fisherprint.models.protocol import SignalModel
from fisherprint.parameters import Parameter, Prior
from fisherprint.subspace import Basis, Method

Floats = NDArray[np.float64]

# Fingerprints simulated at once: a Jacobian of 6852 samples and 8 parameters is 0.9 MB each.
_BATCH = 64


@dataclass(frozen=True, eq=False)
class Bounds:
    """Bounds of a model's unknown parameters in S samples.

    Attributes:
        parameters: the P unknown ones, in the model's order; complex M0 is unknown as well.
        theta: their values, shape (S, P), SI units.
        information: Fisher information, shape (S, P + 2, P + 2).
    """

    parameters: tuple[Parameter, ...]
    theta: Floats
    information: Floats

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the P parameters."""
        return tuple(parameter.name for parameter in self.parameters)

    @cached_property
    def root(self) -> Floats:
        """√CRB, shape (S, P), SI units; infinite for what a sample cannot determine."""
        return np.sqrt(fisher.bounds(self.information)[:, : len(self.parameters)])

    @cached_property
    def confounded(self) -> tuple[tuple[fisher.Group, ...], ...]:
        """Groups of unknowns that cannot be told apart, for each sample (`fisher.confounded`)."""
        return tuple(fisher.confounded(matrix, self.names) for matrix in self.information)


def of(
    model: SignalModel,
    theta: ArrayLike,
    *,
    known: Sequence[str] = (),
    basis: Basis | None = None,
    noise_std: float = 1.0,
) -> Bounds:
    """Bounds of the unknown parameters, of the signal or of its coefficients (§2.1).

    Args:
        model: any signal model.
        theta: parameter sets, shape (S, P), SI units.
        known: parameters that are no unknowns; the fewer unknowns, the lower the bounds.
        basis: of the coefficients, which then stand in for the signal.
        noise_std: σ/|M0| of the real and of the imaginary part each; see `scan_noise`.

    Raises:
        KeyError: a known parameter that the model lacks.
        ValueError: no unknown is left, or the model or the basis refuses its input.
    """
    _checks.positive("noise_std", noise_std)
    known_columns = [model.index(name) for name in known]
    unknown = [p for p in range(len(model.parameters)) if p not in known_columns]
    if not unknown:
        raise ValueError(
            f"expected at least one unknown parameter; got all of {_checks.listing(model.names)} "
            "as known. Leave one out."
        )
    theta = np.asarray(theta, dtype=np.float64)
    _checks.shape("theta", theta, [("S", None), ("P", len(model.parameters))])
    size = len(unknown) + len(fisher.SCALE)
    information = np.empty((len(theta), size, size))
    for first in range(0, len(theta), _BATCH):
        part = slice(first, first + _BATCH)
        out = model.simulate(theta[part])
        signal, jacobian = out.signal, out.jacobian[..., unknown]
        if basis is not None:
            signal, jacobian = basis.compress(signal), basis.compress(jacobian)
        information[part] = fisher.information(signal, jacobian, noise_std=noise_std)
    parameters = tuple(model.parameters[column] for column in unknown)
    return Bounds(parameters, theta[:, unknown], information)


def scan_noise(*, snr: float, scan_time: float, duration: float) -> float:
    """σ/|M0| of the mean over a scan that repeats its cycle: 1 / (SNR √(scan time / duration)).

    Args:
        snr: |M0|/σ of one cycle, σ of the real and of the imaginary part each.
        scan_time: in s, at least the duration; fractions of a cycle count.
        duration: of the cycle, in s.

    Raises:
        ValueError: a value that is not positive, or a scan shorter than a cycle.
    """
    for name, value in (("SNR", snr), ("scan time", scan_time), ("duration", duration)):
        _checks.positive(f"the {name}", value)
    # Both may be sums of the same repetition times in another order.
    if scan_time < duration * (1 - 1e-9):
        raise ValueError(
            f"expected a scan time of at least one cycle, {duration:g} s; got {scan_time:g} s. "
            "A cycle cannot be cut short: scan longer."
        )
    return float(1 / (snr * np.sqrt(scan_time / duration)))


def fit_basis(
    model: SignalModel,
    prior: Prior,
    *,
    rank: int,
    method: Method = "svd",
    size: int = 2048,
    rng: Generator,
) -> Basis:
    """Basis of `size` fingerprints drawn from the prior, by the methods of `subspace.fit` (§2.4).

    Raises:
        ValueError: the prior is of other parameters, the rank is too large, or the method unknown.
    """
    if prior.names != model.names:
        raise ValueError(
            f"expected a prior of {_checks.listing(model.names)}, in this order; got one of "
            f"{_checks.listing(prior.names)}. Make it for this model."
        )
    theta = prior.sample(size, rng=rng)
    simulate = model.simulate if method == "crb-svd" else model.signal
    parts = (simulate(theta[first : first + _BATCH]) for first in range(0, size, _BATCH))
    # One thread: the same basis on any number of cores, and no waiting where they are busy.
    with _threads.one_thread():
        return subspace.fit(parts, rank=rank, method=method)


@dataclass(frozen=True, eq=False)
class BoundTable:
    """√CRB by train, tissue and parameter, of scans that take equally long.

    Attributes:
        trains: L labels.
        tissues: S labels.
        parameters: the P unknown ones; complex M0 is unknown as well.
        known: names of the others.
        theta: the tissues, shape (S, P), SI units.
        signal: √CRB of the whole signal, shape (L, S, P), SI units; infinite if not seen.
        coefficients: that of each train's K coefficients, likewise; None if not asked for.
        rank: K, or None.
        basis_method: how the bases of the coefficients were found; None if nobody said.
        confounded: by (train, tissue), groups that its signal cannot tell apart (or where
            there are coefficients, that these cannot).
        snr: |M0|/σ of one cycle.
        scan_time: in s.
        durations: of each train's cycle, in s.
    """

    trains: tuple[str, ...]
    tissues: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    known: tuple[str, ...]
    theta: Floats
    signal: Floats
    coefficients: Floats | None
    rank: int | None
    basis_method: Method | None
    confounded: Mapping[tuple[str, str], tuple[fisher.Group, ...]]
    snr: float
    scan_time: float
    durations: tuple[float, ...]

    @property
    def observed(self) -> dict[str, Floats]:
        """√CRB (L, S, P) by what is observed: the signal, and the coefficients if asked for."""
        rows = {"signal": self.signal}
        if self.coefficients is not None:
            kind = "CRB-SVD " if self.basis_method == "crb-svd" else ""
            rows[f"{self.rank} {kind}coefficients"] = self.coefficients
        return rows

    @property
    def cycles(self) -> tuple[float, ...]:
        """How often each train repeats its cycle in the scan time."""
        return tuple(self.scan_time / duration for duration in self.durations)

    def relative(self, root: Floats) -> Floats:
        """√CRB (..., S, P) over the tissue's value; NaN where that is 0."""
        return root / np.where(self.theta == 0, np.nan, np.abs(self.theta))

    @staticmethod
    def ratio(root: Floats) -> Floats:
        """√CRB (L, S, P) over that of the first train; NaN unless both are finite."""
        seen = np.isfinite(root) & np.isfinite(root[:1])
        return np.divide(root, root[:1], out=np.full(root.shape, np.nan), where=seen)

    def records(self) -> list[dict[str, Any]]:
        """One flat record for each number, in SI units: what files hold."""
        records: list[dict[str, Any]] = []
        for observed, root in self.observed.items():
            relative, ratio = self.relative(root), self.ratio(root)
            for position in np.ndindex(root.shape):
                train, tissue, column = position
                parameter = self.parameters[column]
                key = self.trains[train], self.tissues[tissue]
                seen = bool(np.isfinite(root[position]))
                alike = [group for group in self.confounded[key] if parameter.name in group]
                records.append(
                    {
                        "train": key[0],
                        "tissue": key[1],
                        "observed": observed,
                        "parameter": parameter.name,
                        "unit": parameter.unit,
                        "value": float(self.theta[tissue, column]),
                        "seen": seen,
                        "root_crb": _or_none(root[position]),
                        "relative": _or_none(relative[position]),
                        "ratio_to_first": _or_none(ratio[position]),
                        "snr": self.snr,
                        "scan_time_s": self.scan_time,
                        "reason": "" if seen else "; ".join(map(fisher.explained, alike)),
                    }
                )
        return records


def table(
    models: Mapping[str, SignalModel],
    tissues: Mapping[str, ArrayLike],
    *,
    durations: Mapping[str, float],
    snr: float,
    scan_time: float | None = None,
    known: Sequence[str] = (),
    bases: Mapping[str, Basis] | None = None,
    basis_method: Method | None = None,
) -> BoundTable:
    """√CRB of tissues, for one or several trains side by side.

    Args:
        models: by the train's label; all of the same parameters.
        tissues: θ of shape (P,) by the tissue's label, SI units.
        durations: of each train's cycle, in s.
        snr: |M0|/σ of one cycle.
        scan_time: in s; that of the longest cycle if None.
        known: parameters that are no unknowns.
        bases: of each train's coefficients, of one rank.
        basis_method: how they were found, for the labels.

    Raises:
        ValueError: no train or no tissue, models of other parameters, or bases of other ranks;
            or as for `of` and `scan_noise`.
        SingularInformationError: a parameter that no train sees in any tissue.
    """
    if not (models and tissues):
        raise ValueError("expected at least one train and one tissue; got none. Name one.")
    names = next(iter(models.values())).names
    for label, model in models.items():
        if model.names != names:
            raise ValueError(
                f"expected the same parameters for each train, {_checks.listing(names)}; got "
                f"{_checks.listing(model.names)} for {label!r}. Give all the same model."
            )
    ranks = {basis.rank for basis in (bases or {}).values()}
    if len(ranks) > 1:
        raise ValueError(f"expected bases of one rank; got {sorted(ranks)}. Choose one.")
    theta = np.array([np.asarray(values, dtype=np.float64) for values in tissues.values()])
    time = max(durations[label] for label in models) if scan_time is None else scan_time
    signal, coefficients = [], []
    for label, model in models.items():
        noise = scan_noise(snr=snr, scan_time=time, duration=durations[label])
        signal.append(of(model, theta, known=known, noise_std=noise))
        if bases:
            basis = bases[label]
            coefficients.append(of(model, theta, known=known, basis=basis, noise_std=noise))
    for found in (signal, coefficients):
        if found:
            fisher.require_determined(
                np.concatenate([bounds.root for bounds in found]),
                np.concatenate([bounds.information for bounds in found]),
                found[0].names,
            )
    confounded = {
        (label, tissue): groups
        for label, bounds in zip(models, coefficients or signal, strict=True)
        for tissue, groups in zip(tissues, bounds.confounded, strict=True)
    }
    return BoundTable(
        trains=tuple(models),
        tissues=tuple(tissues),
        parameters=signal[0].parameters,
        known=tuple(known),
        theta=signal[0].theta,
        signal=np.stack([bounds.root for bounds in signal]),
        coefficients=np.stack([b.root for b in coefficients]) if coefficients else None,
        rank=ranks.pop() if ranks else None,
        basis_method=basis_method,
        confounded=confounded,
        snr=snr,
        scan_time=time,
        durations=tuple(durations[label] for label in models),
    )


@dataclass(frozen=True, eq=False)
class Sweep:
    """√CRB of the unknown parameters against one parameter, the others fixed.

    Attributes:
        parameter: the one that varies.
        values: N of them, SI units.
        parameters: the P unknown ones.
        root: √CRB, shape (N, P), SI units; infinite if not seen.
    """

    parameter: Parameter
    values: Floats
    parameters: tuple[Parameter, ...]
    root: Floats


def sweep(
    model: SignalModel,
    theta: ArrayLike,
    along: tuple[str, ArrayLike],
    *,
    known: Sequence[str] = (),
    basis: Basis | None = None,
    noise_std: float = 1.0,
) -> Sweep:
    """√CRB against one parameter: its name and its values; the others as in θ, shape (P,).

    Further arguments and errors as for `of`.
    """
    grid, (values,), (parameter,) = _grid(model, theta, [along])
    bounds = of(model, grid, known=known, basis=basis, noise_std=noise_std)
    return Sweep(parameter, values, bounds.parameters, bounds.root)


@dataclass(frozen=True, eq=False)
class BoundMap:
    """√CRB of the unknown parameters over two parameters, the others fixed.

    Attributes:
        x: the parameter along the columns.
        y: that along the rows.
        x_values: X of them, SI units.
        y_values: Y of them, SI units.
        parameters: the P unknown ones.
        root: √CRB, shape (Y, X, P), SI units; infinite if not seen.
    """

    x: Parameter
    y: Parameter
    x_values: Floats
    y_values: Floats
    parameters: tuple[Parameter, ...]
    root: Floats


def bound_map(
    model: SignalModel,
    theta: ArrayLike,
    x: tuple[str, ArrayLike],
    y: tuple[str, ArrayLike],
    *,
    known: Sequence[str] = (),
    basis: Basis | None = None,
    noise_std: float = 1.0,
) -> BoundMap:
    """√CRB over two parameters, each a name and its values; the others as in θ, shape (P,).

    Further arguments and errors as for `of`.

    Raises:
        ValueError: both are the same parameter.
    """
    if x[0] == y[0]:
        raise ValueError(f"expected two parameters; got {x[0]!r} twice. Choose another.")
    # The last axis varies fastest: rows of y, columns of x.
    grid, (y_values, x_values), (vertical, horizontal) = _grid(model, theta, [y, x])
    bounds = of(model, grid, known=known, basis=basis, noise_std=noise_std)
    root = bounds.root.reshape(len(y_values), len(x_values), -1)
    return BoundMap(horizontal, vertical, x_values, y_values, bounds.parameters, root)


def _grid(
    model: SignalModel, theta: ArrayLike, axes: Sequence[tuple[str, ArrayLike]]
) -> tuple[Floats, list[Floats], list[Parameter]]:
    """θ with all combinations of values of some parameters; those values; the parameters."""
    base = np.asarray(theta, dtype=np.float64)
    _checks.shape("theta", base, [("P", len(model.parameters))])
    columns = [model.index(name) for name, _ in axes]
    values = [np.asarray(given, dtype=np.float64) for _, given in axes]
    for (name, _), given in zip(axes, values, strict=True):
        _checks.shape(f"the values of {name}", given, [("N", None)])
    grid = np.tile(base, (int(np.prod([given.size for given in values])), 1))
    for column, mesh in zip(columns, np.meshgrid(*values, indexing="ij"), strict=True):
        grid[:, column] = mesh.ravel()
    return grid, values, [model.parameters[column] for column in columns]


def _or_none(value: ArrayLike) -> float | None:
    number = float(np.asarray(value))
    return number if np.isfinite(number) else None
