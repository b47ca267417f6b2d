"""The statements of the paper (§3.1, §3.2), and what two networks have to say to each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fisherprint.evaluate import confidence_interval
from fisherprint.report import Comparison

SNR = 50.0
"""Where the paper looks closest: about the SNR of its in vivo data (§3.2)."""
HIGH_SNR = 100.0
"""The end of the training range, where the bias weighs most."""
# A validation loss so far above the lowest before it is a fluctuation.
_RISE = 0.1


@dataclass(frozen=True)
class Findings:
    """What one trained network shows; SI units, ratios to the bound.

    Attributes:
        loss: squared error over CRB, averaged over the training range of |M0| and test set #1.
        loss_standard_error: of `loss`, over fingerprints.
        loss_by_parameter: likewise by parameter.
        validation_loss: the network's own loss after the last epoch.
        rises: share of epochs with a validation loss more than a tenth above the lowest before.
        bias_share: bias²/CRB by SNRmax, mean over test set #1 and all parameters.
        variance_share: variance/CRB, likewise.
        bias_part: part of the bias in the network's own loss, by SNRmax.
        crossings: SNRmax at which bias and variance share of its own loss are equal.
        bias_share_by_parameter: bias²/CRB at SNR 50.
        variance_share_by_parameter: variance/CRB, likewise.
        median_bias_by_parameter: median |bias| at SNR 50.
        median_std_ratio_by_parameter: median std/√CRB at SNR 50.
        std_deviation_by_parameter: median |std/√CRB - 1| at SNR 50.
        plane_bias: mean |bias| of T2f over the plane of T1 and T2f at SNR 50.
        plane_bias_share: its bias²/CRB.
        plane_variance_share: its variance/CRB.
        plane_std_deviation: its mean |std/√CRB - 1|.
        plane_noise: mean |bias| that an unbiased estimator of that standard deviation would show
            over as many noise realizations.
        left_out: fingerprints of the audit without a bound, or with a failed estimate at SNR 50.
    """

    loss: float
    loss_standard_error: float
    loss_by_parameter: Mapping[str, float]
    validation_loss: float
    rises: float
    bias_share: Mapping[str, float]
    variance_share: Mapping[str, float]
    bias_part: Mapping[str, float]
    crossings: tuple[float, ...]
    bias_share_by_parameter: Mapping[str, float]
    variance_share_by_parameter: Mapping[str, float]
    median_bias_by_parameter: Mapping[str, float]
    median_std_ratio_by_parameter: Mapping[str, float]
    std_deviation_by_parameter: Mapping[str, float]
    plane_bias: float
    plane_bias_share: float
    plane_variance_share: float
    plane_std_deviation: float
    plane_noise: float
    left_out: int


class Pair(NamedTuple):
    """Findings of the networks of both losses, alike in everything else."""

    crb: Findings
    mse: Findings


def rises(losses: Sequence[float], *, by: float = _RISE) -> float:
    """Share of epochs, but the first, whose loss is above (1 + by) times the lowest before (§3.1).

    0 is near-monotone convergence: no epoch undoes what was reached.
    """
    values = np.asarray(losses, dtype=np.float64)
    lowest = np.minimum.accumulate(values)[:-1]
    return float((values[1:] > (1 + by) * lowest).mean()) if len(lowest) else 0.0


def comparisons(ours: Pair, quick: Sequence[Pair] = ()) -> tuple[Comparison, ...]:
    """Each statement of §3.1 and §3.2 with the paper's number and ours.

    Args:
        ours: of the full-scale runs.
        quick: of the quick setting, one pair a seed; at least two, or none.
    """
    rows = []
    for claim in _CLAIMS:
        values = [_value(claim, pair) for pair in quick]
        interval = None
        if values and None not in values:
            interval = confidence_interval([v for v in values if v is not None])
        rows.append(
            Comparison(
                statement=claim.statement,
                source=claim.source,
                paper=claim.paper,
                unit=claim.unit,
                limits=claim.limits,
                ours=_value(claim, ours),
                quick=interval,
            )
        )
    return tuple(rows)


def _value(claim: _Claim, pair: Pair) -> float | None:
    value = claim.value(pair)
    return value if value is not None and np.isfinite(value) else None


class _Claim(NamedTuple):
    """A statement of the paper, its number as printed, and how ours is found, in `unit`."""

    statement: str
    source: str
    paper: str
    value: Callable[[Pair], float | None]
    unit: str = ""
    limits: tuple[float, float] = (-np.inf, np.inf)


def _at_most(limit: float) -> tuple[float, float]:
    return -np.inf, limit


def _at_least(limit: float) -> tuple[float, float]:
    return limit, np.inf


def _between(parts: Mapping[str, float], low: float = 10.0, high: float = 50.0) -> list[float]:
    return [part for snr, part in parts.items() if low <= float(snr) <= high]


def _ratio_of(field: str, name: str) -> Callable[[Pair], float]:
    """Of a parameter's number, that of the CRB network over that of the MSE network."""

    def value(pair: Pair) -> float:
        crb, mse = (getattr(each, field)[name] for each in pair)
        return float(crb / mse)

    return value


_SNR, _HIGH = f"{SNR:g}", f"{HIGH_SNR:g}"

# Limits are what the reproduction asks of itself, docs/decisions/025-reproduction.md.
_CLAIMS = (
    _Claim(
        "CRB loss converges to about 1: on test set #1, over the training range of |M0|",
        "§3.1, Fig. 3", "≈ 1", lambda p: p.crb.loss, limits=_at_most(1.0),
    ),
    _Claim(
        "the same of the MSE network",
        "", "", lambda p: p.mse.loss,
    ),
    _Claim(
        "CRB loss on the validation set after the last epoch",
        "§3.1, Fig. 3", "≈ 1", lambda p: p.crb.validation_loss,
    ),
    _Claim(
        "CRB loss converges virtually monotonously: epochs more than 10 % above the lowest before",
        "§3.1, Fig. 3", "none", lambda p: 100 * p.crb.rises, "%", _at_most(5.0),
    ),
    _Claim(
        "MSE loss fluctuates: the same",
        "§3.1, Fig. 3", "strong", lambda p: 100 * p.mse.rises, "%",
    ),
    _Claim(
        "mean |bias| of T2f over T1 and T2f, CRB network",
        "§3.2, Fig. 4b", "5.23 ms", lambda p: 1e3 * p.crb.plane_bias, "ms", _at_most(5.2),
    ),
    _Claim(
        "the same, MSE network",
        "§3.2, Fig. 4a", "14.1 ms", lambda p: 1e3 * p.mse.plane_bias, "ms",
    ),
    _Claim(
        "the same, CRB over MSE network",
        "§3.2, Fig. 4", "0.37", lambda p: p.crb.plane_bias / p.mse.plane_bias,
        limits=_at_most(0.5),
    ),
    _Claim(
        "bias²/CRB of T2f there, CRB network",
        "authors' maps", "0.56", lambda p: p.crb.plane_bias_share,
    ),
    _Claim(
        "variance/CRB of T2f there, CRB network",
        "authors' maps", "0.67", lambda p: p.crb.plane_variance_share,
    ),
    _Claim(
        "std of T2f there agrees with √CRB: mean |std/√CRB − 1|, CRB network",
        "§3.2, Fig. 4d, e", "close", lambda p: p.crb.plane_std_deviation,
    ),
    _Claim(
        "the same, MSE network",
        "§3.2, Fig. 4c, e", "substantial", lambda p: p.mse.plane_std_deviation,
    ),
    *(
        _Claim(
            f"bias of {name} on test set #1 is smaller: median |bias|, CRB over MSE network",
            "§3.2, Fig. 5", "< 1", _ratio_of("median_bias_by_parameter", name),
            limits=_at_most(1.0),
        )
        for name in ("m0s", "T1", "T2f")
    ),
    *(
        _Claim(
            f"std of {name} agrees better with √CRB: median |std/√CRB − 1|, CRB over MSE network",
            "§3.2, Fig. 6", "< 1", _ratio_of("std_deviation_by_parameter", name),
            limits=_at_most(1.0),
        )
        for name in ("m0s", "T1", "T2f")
    ),
    _Claim(
        "variance dominates the CRB network's loss: largest part of the bias, SNR 10 to 50",
        "§3.2, Fig. 7", "< 0.5", lambda p: max(_between(p.crb.bias_part)), limits=_at_most(0.5),
    ),
    _Claim(
        "bias takes over only beyond the training range: first crossing above SNR 10",
        "§3.2, Fig. 7", "> 100",
        lambda p: next((snr for snr in p.crb.crossings if snr > 10), None),
        limits=_at_least(100.0),
    ),
    _Claim(
        "bias dominates the MSE network's loss: smallest part of the bias, SNR 10 to 50",
        "§3.2, Fig. 7", "> 0.5", lambda p: min(_between(p.mse.bias_part)), limits=_at_least(0.5),
    ),
    _Claim(
        "bias²/CRB at SNR 50, CRB network",
        "§3.2, Fig. 8", "", lambda p: p.crb.bias_share[_SNR], limits=_at_most(0.25),
    ),
    _Claim(
        "variance/CRB at SNR 50, CRB network",
        "§3.2, Fig. 8", "", lambda p: p.crb.variance_share[_SNR],
    ),
    _Claim(
        "loss at SNR 50, CRB network",
        "§3.2, Fig. 8", "≈ 1", lambda p: p.crb.bias_share[_SNR] + p.crb.variance_share[_SNR],
        limits=_at_most(1.0),
    ),
    _Claim(
        "bias²/CRB at SNR 50 is lower: CRB over MSE network",
        "§3.2, Fig. 8", "< 1", lambda p: p.crb.bias_share[_SNR] / p.mse.bias_share[_SNR],
        limits=_at_most(1.0),
    ),
    _Claim(
        "bias²/CRB at SNR 100, CRB network",
        "§3.2, Fig. 7", "", lambda p: p.crb.bias_share[_HIGH],
    ),
    _Claim(
        "variance/CRB at SNR 100, CRB network",
        "§3.2, Fig. 7", "", lambda p: p.crb.variance_share[_HIGH],
    ),
)  # fmt: skip
