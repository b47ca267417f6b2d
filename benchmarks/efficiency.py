"""Least squares with and without a prior, on test data of a run: against the bound, and the truth.

    python benchmarks/efficiency.py RUN [--snr 50] [--fingerprints 120] [--noise 24] [--seed 0]
        [--prior 1 2 | --steps 0.5 15]

Each fit starts at the estimate of the run's network, other parameters at the most similar
fingerprint. "Determined" are the fingerprints whose √CRB is below a third of the prior's spread;
the shares bias²/CRB (less what so few noises leave of the variance) and variance/CRB are of
these, and the bound knows of no prior. The columns behind are of all fingerprints: root mean
square error, mean square error over the mean of the announced variance, and how often the truth
lies within one announced standard deviation. With --steps there is no search, but so many steps,
damped by these multiples of the prior's std (0.5 15 are those of `fit --two-steps`).
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fisherprint import experiment, fisher, fit, train
from fisherprint.experiment import fit_inputs
from fisherprint.network import as_estimator

_ENTRIES = 16384

Floats = NDArray[np.float64]


def rows(
    label: str,
    names: tuple[str, ...],
    estimates: Floats,
    announced: Floats | None,
    truth: Floats,
    crb: Floats,
    determined: NDArray[np.bool_],
) -> list[str]:
    """A line for each parameter of estimates (S, N, E), truth and bound (S, E)."""
    n_noise = estimates.shape[1]
    error = estimates - truth[:, None]
    variance = estimates.var(axis=1, ddof=1)
    bias = (error.mean(axis=1) ** 2 - variance / n_noise) / crb
    lines = []
    for e, name in enumerate(names):
        inside = determined[:, e]
        if inside.sum() < 2:
            continue
        b, v = bias[inside, e], variance[inside, e] / crb[inside, e]
        root = np.sqrt(inside.sum())
        far = np.abs(error[inside, :, e]) > 5 * np.sqrt(crb[inside, None, e])
        cells = [
            *(label, name, str(inside.sum())),
            f"{b.mean():.3f} ± {b.std() / root:.3f} + {v.mean():.3g} ± {v.std() / root:.2g}",
            f"{np.median(b):.3f} + {np.median(v):.2f}",
            f"{100 * far.mean():.1f} %",
            f"{np.sqrt(np.mean(error[..., e] ** 2)):.3g}",
        ]
        if announced is not None:
            ratio = np.mean(error[..., e] ** 2) / np.mean(announced[..., e] ** 2)
            within = np.mean(np.abs(error[..., e]) < announced[..., e])
            cells += [f"{ratio:.2f}", f"{within:.3f}"]
        lines.append(f"| {' | '.join([*cells, '', ''][:9])} |")
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--snr", type=float, default=50.0, help="|M0|/σ")
    parser.add_argument("--fingerprints", type=int, default=120)
    parser.add_argument("--noise", type=int, default=24, help="realizations of each")
    parser.add_argument("--seed", type=int, default=0, help="of fingerprints and noise")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--prior", type=float, nargs="*", default=[1.0, 2.0], help="widths")
    way.add_argument("--steps", type=float, nargs="+", help="no search; damped by the prior's std")
    arguments = parser.parse_args()

    run = experiment.open_run(arguments.run)
    trained, (data, pulses, model) = experiment.open_trained(run), experiment.read_data(run)
    names = tuple(run.experiment.training.estimated)
    columns = [model.index(name) for name in names]
    std, n_noise = 1 / arguments.snr, arguments.noise
    rng = np.random.default_rng(arguments.seed)
    test, training = data.samples["test"], data.samples["training"]
    picked = rng.choice(len(test.theta), arguments.fingerprints, replace=False)
    theta = np.asarray(test.theta[picked], dtype=np.float64)
    c, jacobian = fit.simulated(model, data.basis, theta)
    crb = fisher.bounds(fisher.information(c, jacobian, noise_std=std))[:, columns]
    spread = np.std(test.theta[:, columns], axis=0)
    determined = crb < np.square(spread / 3)

    x = np.repeat(c, n_noise, axis=0)
    x = x + std * rng.standard_normal((*x.shape, 2)).view(np.complex128)[..., 0]
    dictionary = fit.Dictionary(
        data.names, training.theta[:_ENTRIES], training.coefficients[:_ENTRIES]
    )
    extra = train.extra_inputs(run.experiment.training, x, np.empty(0), noise_std=std)
    by_network = np.asarray(as_estimator(trained.network)(np.concatenate([x, extra], axis=-1)))
    start = dictionary.nearest(x, 1)
    start[..., columns] = by_network[:, None]

    print(f"SNR {arguments.snr:g}, {len(theta)} fingerprints × {n_noise}\n")
    print("| | parameter | determined | bias²/CRB + variance/CRB, mean ± standard error | median "
          "| beyond 5 √CRB | error | error²/announced | within 1 SD |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    shape = (len(theta), n_noise, len(names))
    truth = theta[:, columns]
    table = rows("network", names, by_network.reshape(shape), None, truth, crb, determined)
    print("\n".join(table), flush=True)
    prior = fit_inputs.prior_of(run, model, pulses)
    unknown = set(model.names)
    plain = fit.LeastSquares(
        model,
        data.basis,
        start=theta[0],
        bounds=fit_inputs.bounds_of(prior, model),
        noise_std=std,
    )
    estimators = {"least squares": plain}
    if arguments.steps:
        steps = fit_inputs.steps_of(prior, unknown, arguments.steps)
        label = f"steps of {', '.join(f'{width:g}' for width in arguments.steps)}"
        estimators = {label: dataclasses.replace(plain, steps=steps)}
    else:
        for width in arguments.prior:
            normals = fit_inputs.normals_of(prior, width, unknown)
            estimators[f"prior × {width:g}"] = dataclasses.replace(plain, prior=normals)
    for label, estimator in estimators.items():
        found = estimator.fit(x, start=start)
        estimates, announced = (
            values[:, columns].reshape(shape) for values in (found.theta, found.std)
        )
        print(
            "\n".join(rows(label, names, estimates, announced, truth, crb, determined)), flush=True
        )


if __name__ == "__main__":
    main()
