"""Trained networks side by side, from the audits of their runs: shares of the loss, and errors.

    python benchmarks/beyond.py RUN [RUN ...] [--snr 50]

"Determined" are the fingerprints whose √CRB is below a third of the prior's spread, parameter by
parameter. Errors are root mean squares over the noise of one fingerprint; of these the median over
the test set, in the parameter's unit.

Of runs on the same fingerprints, say of two bases, a second table has the first run over each
other one: √CRB, the error that data and prior together allow (√ of the mean local form of van
Trees' bound, docs/decisions/021-van-trees-bound.md), and what the networks do.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from fisherprint import experiment, files
from fisherprint.evaluate import Audit, Score
from fisherprint.parameters import Parameter


def rows(
    label: str, audit: Audit, score: Score, described: list[Parameter], *, snr: float
) -> list[str]:
    """A line for each parameter and one for their mean."""
    level = audit.level(snr)
    inside = audit.determined[level]
    everywhere, within = audit.mean_shares_by_parameter(), audit.mean_determined_shares()
    bias, variance = audit.shares.bias[level], audit.shares.variance[level]
    outside = [np.nanmean(np.where(inside, np.nan, share), axis=0) for share in (bias, variance)]
    pairs = [(everywhere.bias[level], everywhere.variance[level])]
    pairs += [(within.bias[level], within.variance[level]), (outside[0], outside[1])]
    errors = np.nanmedian(np.sqrt(audit.bias[level] ** 2 + audit.variance[level]), axis=0)
    lines = []
    for e, parameter in enumerate(described):
        shares = [f"{b[e]:.3f} + {v[e]:.3f}" for b, v in pairs]
        error = f"{parameter.display_factor * errors[e]:.3g} {parameter.display_unit}".strip()
        head = [label, parameter.name, f"{score.loss_by_parameter[e]:.3f}"]
        lines.append([*head, f"{100 * inside[:, e].mean():.0f} %", *shares, error])
    shares = [f"{np.mean(b):.3f} + {np.mean(v):.3f}" for b, v in pairs]
    lines.append([label, "mean", f"{score.loss:.3f}", f"{100 * inside.mean():.0f} %", *shares, ""])
    return [f"| {' | '.join(line)} |" for line in lines]


def ratios(label: str, first: Audit, other: Audit, *, snr: float) -> list[str]:
    """The first run over another one, a line for each parameter."""
    one, two = first.level(snr), other.level(snr)
    lines = []
    for e, name in enumerate(first.names):
        finite = np.isfinite(first.crb[:, e]) & np.isfinite(other.crb[:, e])
        both = first.determined[one][:, e] & other.determined[two][:, e]
        root = np.sqrt(first.crb[:, e] / other.crb[:, e])
        std = np.sqrt(first.variance[one] / other.variance[two])[:, e]
        error = first.root_mean_square[one, e] / other.root_mean_square[two, e]
        prior = "–"
        if first.prior is not None and other.prior is not None:
            prior = f"{np.sqrt(first.prior.local[one, e] / other.prior.local[two, e]):.3f}"
        cells = [label, name, f"{np.median(root[finite]):.3f}", prior, f"{error:.3f}"]
        cells += [f"{np.median(root[both]):.3f}", f"{np.median(std[both]):.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def intervals(label: str, first: Audit, other: Audit, *, snr: float) -> list[str]:
    """Errors of the first run over those of another one, with 95 % of resampled fingerprints."""
    one, two = first.level(snr), other.level(snr)
    rng = np.random.default_rng(0)
    square = np.square(first.bias[one]) + first.variance[one]
    peer = np.square(other.bias[two]) + other.variance[two]
    lines = []
    for e, name in enumerate(first.names):
        both = first.determined[one][:, e] & other.determined[two][:, e]
        cells = [label, name]
        for average, kept in (
            (np.median, np.full_like(both, True)),
            (np.mean, np.full_like(both, True)),
            (np.mean, both),
        ):
            x, y = square[kept, e], peer[kept, e]
            again = rng.integers(len(x), size=(1000, len(x)))
            ratio = np.sqrt(average(x) / average(y))
            drawn = np.sqrt(average(x[again], axis=1) / average(y[again], axis=1))
            low, high = np.percentile(drawn, [2.5, 97.5])
            cells.append(f"{ratio:.3f} [{low:.3f}, {high:.3f}]")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--snr", type=float, default=50.0, help="SNRmax")
    arguments = parser.parse_args()
    print(f"bias²/CRB + variance/CRB and errors at SNRmax {arguments.snr:g}\n")
    print("| run | parameter | loss, training range | determined | all | determined | the rest "
          "| median error |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    audits: dict[str, Audit] = {}
    for folder in arguments.runs:
        run = experiment.open_run(folder)
        audit, score = files.read_audit(run.audit)
        audits[folder.name] = audit
        _, _, model = experiment.read_data(run)
        described = [model.parameters[model.index(name)] for name in audit.names]
        print("\n".join(rows(folder.name, audit, score, described, snr=arguments.snr)))

    (head, first), *others = audits.items()
    alike = {
        label: audit
        for label, audit in others
        if audit.names == first.names and np.array_equal(audit.truth, first.truth)
    }
    if not alike:
        return
    print(f"\n{head} over others\n")
    print("| over | parameter | √CRB, median | √van Trees | root mean square error "
          "| √CRB, determined in both | standard deviation there |")  # fmt: skip
    print("|---|---|---|---|---|---|---|")
    for label, audit in alike.items():
        print("\n".join(ratios(label, first, audit, snr=arguments.snr)))
    print("\nerrors [95 % of resampled fingerprints]\n")
    print(
        "| over | parameter | median | root mean square | root mean square, determined in both |"
    )
    print("|---|---|---|---|---|")
    for label, audit in alike.items():
        print("\n".join(intervals(label, first, audit, snr=arguments.snr)))


if __name__ == "__main__":
    main()
