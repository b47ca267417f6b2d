"""The paper's results again: its figures 3 to 8, and its statements beside ours (§2.7, §3)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fisherprint import _checks, _storage, files, fisher, report, train
from fisherprint import evaluate as evaluation
from fisherprint.evaluate import Audit, AuditMap, Score
from fisherprint.experiment import tissues
from fisherprint.experiment.claims import HIGH_SNR, SNR, Findings, Pair, comparisons, rises
from fisherprint.experiment.folder import Progress, Run, Say, open_run, read_data, versions
from fisherprint.experiment.mapping import load_network
from fisherprint.experiment.schema import ExperimentError, shareable
from fisherprint.models.protocol import SignalModel
from fisherprint.network import as_estimator
from fisherprint.parameters import Parameter
from fisherprint.report import Comparison
from fisherprint.subspace import Basis

Floats = NDArray[np.float64]

PARAMETER = "T2f"
"""Whose maps Fig. 4 shows."""
# Data set #2: two planes through the nominal values, x and y (§2.4, docs/decisions/025).
PLANES = (
    (("T1", 0.64, 2.0), ("T2f", 30e-3, 150e-3)),
    (("T1", 0.64, 2.0), ("m0s", 0.0, 0.25)),
)
POINTS = 64
LABELS = {"crb": "CRB network", "mse": "MSE network"}
_MIN_SEEDS = 3
# Fingerprints simulated at once: a Jacobian of 6852 samples and 8 parameters is 0.9 MB each.
_BATCH = 64
_DPI = 110


@dataclass(frozen=True, eq=False)
class _Trained:
    """A run that is finished but for its maps."""

    run: Run
    card: Mapping[str, Any]
    log: Sequence[Mapping[str, Any]]
    audit: Audit
    score: Score

    @property
    def config(self) -> train.TrainingConfig:
        return train.TrainingConfig.model_validate(self.card["config"])


def reproduce(
    crb: Path,
    mse: Path,
    out: Path,
    *,
    quick: Sequence[Path] = (),
    n_noise: int = 1000,
    say: Say,
    progress: Progress,
) -> tuple[Comparison, ...]:
    """Write figures 3 to 8, the table of statements, and all numbers, from finished runs.

    Args:
        crb: evaluated run of the CRB loss.
        mse: of the MSE loss, on the same data set and alike in everything else.
        out: folder for `figure-*.png`, `table.md` and `numbers.json`.
        quick: evaluated runs of the quick setting, of both losses for each of 3 seeds or more.
        n_noise: noise realizations at each point of data set #2.
        say: told what was written.
        progress: told how many points of data set #2 are done.

    Raises:
        ExperimentError: a run that is missing, not trained or not evaluated, of another loss,
            data set or configuration than it must be, or too few seeds.
        ValueError: an audit without SNRmax 50 or 100.
        KeyError: a run without T1, T2f and m0s.
    """
    full = {loss: _read(folder, loss) for loss, folder in (("crb", crb), ("mse", mse))}
    _require_alike(full["crb"], full["mse"], but=("loss",))
    seeds = _by_seed([_read(folder) for folder in quick])

    planes = _Planes(n_noise, progress)
    pairs = {loss: planes.of(trained, PLANES) for loss, trained in full.items()}
    figures = _figures(full, pairs)
    ours = Pair(*(_findings(full[loss], pairs[loss][0]) for loss in LABELS))
    repeated = {
        seed: Pair(*(_findings(both[loss], *planes.of(both[loss], PLANES[:1])) for loss in LABELS))
        for seed, both in seeds.items()
    }
    rows = comparisons(ours, list(repeated.values()))
    for name, figure in figures.items():
        with _storage.replacing(out / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=_DPI)
        say(f"figure: {out / name}.png")
    files.write_text(out / "table.md", report.comparison_table(rows))
    say(f"table: {out / 'table.md'}")
    files.write_json(
        out / "numbers.json",
        _jsonable(
            {
                "full": ours._asdict() | {"provenance": _provenance(full, n_noise)},
                "quick": {str(seed): pair._asdict() for seed, pair in repeated.items()},
                "comparison": rows,
            }
        ),
    )
    say(f"numbers: {out / 'numbers.json'}")
    return rows


def _read(folder: Path, loss: str | None = None) -> _Trained:
    """A run with its network and its audit, of the loss if one is named.

    Raises:
        ExperimentError: something is missing or of another loss.
    """
    run = open_run(folder)
    _, card = load_network(run)
    if not run.audit.exists():
        raise ExperimentError(
            f"expected an evaluated run; {folder} has no audit yet. Evaluate it: "
            f"fisherprint evaluate {folder}"
        )
    known = card["config"]["loss"]
    if known not in LABELS or loss not in (None, known):
        wanted = " or ".join(LABELS) if loss is None else loss
        raise ExperimentError(
            f"expected a network of the {wanted} loss in {folder}; it is of the {known} loss. "
            "Name another run."
        )
    if card.get("inputs"):
        raise ExperimentError(
            "expected a network of the coefficients alone, as in the paper; that in "
            f"{folder} also has the inputs {_checks.listing(card['inputs'])}. Name another run."
        )
    trained = _Trained(run, card, files.read_jsonl(run.log), *files.read_audit(run.audit))
    for snr in (SNR, HIGH_SNR):
        trained.audit.level(snr)
    return trained


def _require_alike(first: _Trained, other: _Trained, *, but: tuple[str, ...]) -> None:
    """Require the same data set and the same training but for some fields."""
    if first.card["dataset_sha256"] != other.card["dataset_sha256"]:
        raise ExperimentError(
            f"expected networks of one data set; {first.run.folder} and {other.run.folder} have "
            f"different ones. Train the second on that of the first: fisherprint vary "
            f"{first.run.folder} -o RUN --set training.loss={other.config.loss}"
        )
    one, two = first.config.model_dump(), other.config.model_dump()
    changed = [name for name in one if name not in but and one[name] != two[name]]
    if changed:
        raise ExperimentError(
            f"expected networks that differ in {_checks.listing(but)} alone; {first.run.folder} "
            f"and {other.run.folder} differ in {_checks.listing(changed)}. Train one again."
        )
    if not np.array_equal(first.audit.snr, other.audit.snr) or not np.array_equal(
        first.audit.truth, other.audit.truth
    ):
        raise ExperimentError(
            f"expected audits of the same fingerprints and SNRmax; those of {first.run.folder} "
            f"and {other.run.folder} differ. Evaluate one again with --force and the [evaluation] "
            "of the other."
        )


def _by_seed(quick: Sequence[_Trained]) -> dict[int, dict[str, _Trained]]:
    """Runs of the quick setting by seed and loss."""
    found: dict[int, dict[str, _Trained]] = defaultdict(dict)
    for trained in quick:
        _require_alike(quick[0], trained, but=("loss", "seed"))
        config = trained.config
        if config.loss in found[config.seed]:
            raise ExperimentError(
                f"expected one quick run for each seed and loss; got two of seed {config.seed} "
                f"and the {config.loss} loss, {found[config.seed][config.loss].run.folder} and "
                f"{trained.run.folder}. Leave one out."
            )
        found[config.seed][config.loss] = trained
    lacking = sorted(seed for seed, both in found.items() if len(both) < len(LABELS))
    if quick and (lacking or len(found) < _MIN_SEEDS):
        alone = f", of which {_checks.listing(map(str, lacking))} with one loss alone"
        raise ExperimentError(
            f"expected quick runs of both losses for at least {_MIN_SEEDS} seeds; got "
            f"{len(found)} seeds{alone * bool(lacking)}. Train more: fisherprint vary "
            f"{quick[0].run.folder} -o RUN --set training.seed=1"
        )
    return dict(sorted(found.items()))


class _Planes:
    """Audits over planes of data set #2; each plane is simulated once for each basis."""

    def __init__(self, n_noise: int, progress: Progress) -> None:
        self._n_noise, self._progress = n_noise, progress
        self._simulated: dict[tuple[str, object], train.Samples] = {}

    def of(self, trained: _Trained, planes: Sequence[Any]) -> list[AuditMap]:
        data, _, model = read_data(trained.run)
        digest = files.file_digest(trained.run.dataset)
        if trained.card["dataset_sha256"] != digest:
            raise ExperimentError(
                f"expected the data set that {trained.run.network} was trained with; "
                f"{trained.run.dataset} is another. Train again: "
                f"fisherprint train {trained.run.folder} --force"
            )
        estimator = as_estimator(load_network(trained.run)[0])
        return [self._over(trained, estimator, model, data.basis, plane) for plane in planes]

    def _over(
        self,
        trained: _Trained,
        estimator: evaluation.Estimator,
        model: SignalModel,
        basis: Basis,
        plane: tuple[tuple[str, float, float], tuple[str, float, float]],
    ) -> AuditMap:
        x_values, y_values = (np.linspace(low, high, POINTS) for _, low, high in plane)
        x, y = (model.parameters[model.index(name)] for name, _, _ in plane)
        what = f"{x.name} x {y.name}"
        key = trained.card["dataset_sha256"], plane
        if key not in self._simulated:
            theta = grid(model, (x.name, x_values), (y.name, y_values))
            self._simulated[key] = _simulated(
                model,
                basis,
                theta,
                lambda done, total: self._progress(f"simulation of {what}", done, total),
            )
        points = self._simulated[key].select(trained.config.estimated)
        name = trained.run.folder.name
        audit = evaluation.audit(
            estimator,
            points,
            snr=[SNR],
            n_noise=self._n_noise,
            progress=lambda done, total: self._progress(f"{what} of {name}", done, total),
            # The same noise for each network.
            rng=np.random.default_rng(trained.run.experiment.evaluation.seed),
        )
        return AuditMap(x, y, x_values, y_values, audit)


def grid(model: SignalModel, x: tuple[str, Floats], y: tuple[str, Floats]) -> Floats:
    """Data set #2: θ over two parameters, the others at the prior's nominal values (§2.4).

    Args:
        model: of the parameters.
        x: name and values of the parameter that varies fastest.
        y: of the other one.

    Returns:
        Shape (Y·X, P).
    """
    theta = np.tile(tissues.tissue(tissues.PRIOR, model.names), (len(x[1]) * len(y[1]), 1))
    theta[:, model.index(x[0])] = np.tile(x[1], len(y[1]))
    theta[:, model.index(y[0])] = np.repeat(y[1], len(x[1]))
    return theta


def _simulated(
    model: SignalModel, basis: Basis, theta: Floats, progress: Callable[[int, int], None]
) -> train.Samples:
    """Coefficients of parameter sets (S, P) and the coefficients' bound of all P parameters."""
    coefficients = np.empty((len(theta), basis.rank), dtype=np.complex128)
    crb = np.empty(theta.shape)
    for first in range(0, len(theta), _BATCH):
        part = slice(first, first + _BATCH)
        out = model.simulate(theta[part])
        coefficients[part] = basis.compress(out.signal)
        information = fisher.information(
            coefficients[part], basis.compress(out.jacobian), noise_std=1.0
        )
        crb[part] = fisher.bounds(information)[:, : theta.shape[1]]
        progress(min(first + _BATCH, len(theta)), len(theta))
    return train.Samples(model.names, coefficients, theta, crb)


def _findings(trained: _Trained, plane: AuditMap) -> Findings:
    audit, score = trained.audit, trained.score
    level = audit.level(SNR)
    mean, by_parameter = audit.mean_shares(), audit.mean_shares_by_parameter()
    own = mean if trained.config.loss == "crb" else audit.mean_squares()

    def by_snr(values: Floats) -> dict[str, float]:
        return {f"{audit.snr[q]:g}": float(values[q]) for q in np.argsort(audit.snr)}

    def by_name(values: Floats) -> dict[str, float]:
        return {name: float(v) for name, v in zip(audit.names, values, strict=True)}

    bias, std, root = (part(PARAMETER) for part in (plane.bias, plane.std, plane.root))
    seen = np.isfinite(root)
    ratio = std[seen] / root[seen]
    return Findings(
        loss=score.loss,
        loss_standard_error=score.standard_error,
        loss_by_parameter=by_name(score.loss_by_parameter),
        validation_loss=trained.log[-1]["validation_loss"],
        rises=rises([record["validation_loss"] for record in trained.log]),
        bias_share=by_snr(mean.bias),
        variance_share=by_snr(mean.variance),
        bias_part=by_snr(own.bias / own.loss),
        crossings=evaluation.crossings(audit.snr, own),
        bias_share_by_parameter=by_name(by_parameter.bias[level]),
        variance_share_by_parameter=by_name(by_parameter.variance[level]),
        median_bias_by_parameter=by_name(np.nanmedian(np.abs(audit.bias[level]), axis=0)),
        median_std_ratio_by_parameter=by_name(audit.median_std_ratio_by_parameter()[level]),
        std_deviation_by_parameter=by_name(
            np.nanmedian(np.abs(audit.std_ratio[level] - 1), axis=0)
        ),
        plane_bias=float(np.abs(bias).mean()),
        plane_bias_share=float(((bias[seen] / root[seen]) ** 2).mean()),
        plane_variance_share=float((ratio**2).mean()),
        plane_std_deviation=float(np.abs(ratio - 1).mean()),
        # E|x| of a normal deviate of standard deviation s is s √(2/π).
        plane_noise=float(std.mean() * np.sqrt(2 / np.pi / plane.audit.n_noise)),
        left_out=audit.n_unbounded + int(audit.n_failed[level]),
    )


def _figures(
    full: Mapping[str, _Trained], planes: Mapping[str, Sequence[AuditMap]]
) -> dict[str, Figure]:
    """Each figure of the paper by the name of its file."""
    crb = full["crb"]
    _, _, model = read_data(crb.run)
    described = [model.parameters[model.index(name)] for name in crb.config.estimated]
    shown = model.parameters[model.index(PARAMETER)]
    audits = {LABELS[loss]: trained.audit for loss, trained in full.items()}
    low, high = (scale / crb.config.noise_std for scale in crb.config.scale_range)
    figures = {
        "figure-3-convergence": report.convergences(
            {loss: trained.log for loss, trained in full.items()}
        ),
        "figure-5-bias": report.bias_of_networks(audits, described, snr=SNR),
        "figure-6-std": report.std_of_networks(audits, described, snr=SNR),
        "figure-7-shares-by-snr": report.shares_of_networks(audits, training_snr=(low, high)),
        "figure-8-shares-by-bound": report.bound_shares_of_networks(audits, described, snr=SNR),
    }
    for both in zip(*planes.values(), strict=True):
        maps = {LABELS[loss]: each for loss, each in zip(planes, both, strict=True)}
        x, y = both[0].x, both[0].y
        figures[f"figure-4-{x.name}-{y.name}"] = report.audit_maps(
            maps, shown, marked=_nominal(model, x, y)
        )
    return dict(sorted(figures.items()))


def _nominal(model: SignalModel, *parameters: Parameter) -> tuple[float, float]:
    centre = tissues.tissue(tissues.PRIOR, model.names)
    x, y = (float(centre[model.index(parameter.name)]) for parameter in parameters)
    return x, y


def _provenance(full: Mapping[str, _Trained], n_noise: int) -> dict[str, Any]:
    """What the numbers come from."""
    crb = full["crb"]
    shared = ("dataset_sha256", "train_sha256", "basis_sha256")
    return {
        **{key: crb.card[key] for key in shared},
        "weights_sha256": {loss: each.card["weights_sha256"] for loss, each in full.items()},
        "trained_with": {loss: each.card["versions"] for loss, each in full.items()},
        "experiment": shareable(crb.run.experiment),
        "fingerprints_audited": len(crb.audit.truth),
        "n_noise": crb.audit.n_noise,
        "n_noise_on_planes": n_noise,
        "points_on_planes": POINTS**2,
        "versions": versions(),
    }


def _jsonable(value: Any) -> Any:
    """Nested values as JSON knows them: dataclasses and tuples opened, no NaN or Inf."""
    if isinstance(value, Comparison):
        quick = None if value.quick is None else value.quick._asdict()
        opened = {**asdict(value), "agrees": value.agrees, "quick": quick}
        return {key: _jsonable(part) for key, part in opened.items()}
    if isinstance(value, Findings):
        return _jsonable(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _jsonable(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(part) for part in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
