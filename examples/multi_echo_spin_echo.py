"""Any model: T2 and B1 from a multi-echo spin echo, by extended phase graphs (EPG) in torch.

Imperfect refocusing makes stimulated echoes, so the decay alone does not tell T2; the train of
echoes tells both. Source of the EPG: Weigel, J Magn Reson Imaging 2015, doi:10.1002/jmri.24619.
"""

# %% The model: CPMG, refocusing by B1·150°, 10 ms between echoes, T1 taken as 1 s
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

import fisherprint as fp
from fisherprint import evaluate, models, simulate, train
from fisherprint.network import Network, as_estimator

ECHOES, SPACING, LONGITUDINAL, REFOCUSING = 20, 10e-3, 1.0, np.deg2rad(150)  # s, s, rad
T2 = fp.Parameter("T2", "$T_2$", "s", (1e-3, 5.0), "ms", 1e3)
B1 = fp.Parameter("B1", "$B_1$", "", (0.1, 1.2))


def epg(theta: torch.Tensor) -> torch.Tensor:
    """Echo amplitudes; states F+, F- and Z by order of dephasing are real under CPMG."""
    t2, b1 = theta
    half = torch.cos(b1 * REFOCUSING / 2) ** 2, torch.sin(b1 * REFOCUSING / 2) ** 2
    sine, cosine = torch.sin(b1 * REFOCUSING), torch.cos(b1 * REFOCUSING)
    e1, e2 = np.exp(-SPACING / 2 / LONGITUDINAL), torch.exp(-SPACING / 2 / t2)
    zero = torch.zeros(1, dtype=torch.float64)
    rest = torch.zeros(2 * ECHOES, dtype=torch.float64)
    # After the excitation; its angle B1·90° only scales the signal and goes with M0.
    plus, minus, z = (torch.cat([zero + start, rest]) for start in (1.0, 1.0, 0.0))

    def wait(plus, minus, z):
        # Half an echo spacing: decay, then all orders move up by one. F+0 and F-0 are one state.
        minus = torch.cat([minus[1:], zero])
        plus = torch.cat([minus[:1] * e2, plus[:-1] * e2])
        return plus, minus * e2, z * e1

    echoes = []
    for _ in range(ECHOES):
        plus, minus, z = wait(plus, minus, z)
        plus, minus, z = (
            half[0] * plus + half[1] * minus + sine * z,
            half[1] * plus + half[0] * minus - sine * z,
            (minus - plus) * sine / 2 + cosine * z,
        )
        plus, minus, z = wait(plus, minus, z)
        echoes.append(plus[0])
    return torch.stack(echoes)


model = models.TorchModel(epg, [T2, B1])


# %% The bound by autograd is that of another calculation: spins, and complex-step derivatives
def spins(t2: complex, b1: complex) -> np.ndarray:
    """The same by the Bloch equations for spins at angles of dephasing that cover the circle."""
    # The mean over n angles is that over the circle while fewer than n orders are occupied.
    n = 4 * ECHOES + 2
    phase = 2 * np.pi * np.arange(n) / n
    c, s = np.cos(phase), np.sin(phase)
    e1, e2 = np.exp(-SPACING / 2 / LONGITUDINAL), np.exp(-SPACING / 2 / t2)
    ca, sa = np.cos(b1 * REFOCUSING), np.sin(b1 * REFOCUSING)
    x, y, z = np.ones(n), np.zeros(n), np.zeros(n)
    signal = []
    for _ in range(ECHOES):
        for pulse in (True, False):
            x, y, z = (c * x - s * y) * e2, (s * x + c * y) * e2, z * e1
            if pulse:  # about x, along which the magnetization began
                y, z = ca * y - sa * z, sa * y + ca * z
        signal.append(x.mean())
    return np.array(signal)


theta = np.array([[0.05, 0.7], [0.08, 0.9], [0.15, 1.05]])
out = model.simulate(theta)
step = 1e-30
signal = np.array([spins(*row) for row in theta])
by_t2 = np.array([spins(a + 1j * step, b).imag / step for a, b in theta])
by_b1 = np.array([spins(a, b + 1j * step).imag / step for a, b in theta])
np.testing.assert_allclose(out.signal, signal, atol=1e-12)
expected = fp.crb(signal, np.stack([by_t2, by_b1], axis=-1))
worst = np.abs(fp.crb(out.signal, out.jacobian) / expected - 1).max()
print(
    f"bound by autograd against spins and complex steps: largest relative difference {worst:.1e}"
)
assert worst < 1e-6
# With perfect refocusing (B1·150° = 180°) it is the closed form: exp(-n TE/T2).
perfect = model.signal([[0.08, 1.2]])[0]
np.testing.assert_allclose(perfect, np.exp(-np.arange(1, 21) * SPACING / 0.08), atol=1e-12)

# %% A data set with bounds, in a subspace
prior = fp.Prior({"T2": fp.Uniform(0.03, 0.2), "B1": fp.Uniform(0.6, 1.1)})
sizes = {"training": 20_000, "validation": 1000, "test": 500}
data = simulate.dataset(model, prior, sizes, basis=6, seed=0)
print(f"6 coefficients hold {data.energy:.6%} of the energy")


def samples(split: str) -> train.Samples:
    reduced = data.samples[split]
    return train.Samples(data.names, reduced.coefficients, reduced.theta, reduced.crb_coefficients)


# %% A network trained with the CRB-weighted loss
config = train.TrainingConfig(
    estimated=data.names,
    epochs=12,
    batch_size=512,
    learning_rate=1e-2,
    halve_every=2,
    noise_std=0.03,
    remove_phase=True,
)
began = time.perf_counter()
for epoch, state in train.train(samples("training"), samples("validation"), config):
    if epoch.number % 2 == 0:
        print(f"epoch {epoch.number}: validation loss {epoch.validation_loss:.3f}", flush=True)
    trained = state
seconds = time.perf_counter() - began
network = as_estimator(Network.from_weights(trained.weights).eval())

# %% Its error in units of the bound, on data that it has not seen
rng = np.random.default_rng(1)
score = evaluate.loss_over_scales(
    network, samples("test"), scale_range=config.scale_range, noise_std=config.noise_std, rng=rng
)
print(f"loss over SNR 3 to 33: {score.loss:.3f} ± {score.standard_error:.3f}, {seconds:.0f} s")
audit = evaluate.audit(network, samples("test"), snr=(5, 10, 20, 30), n_noise=100, rng=rng)
shares = audit.mean_shares()
print("  SNR   bias²/CRB  variance/CRB")
for snr, bias, variance in zip(audit.snr, shares.bias, shares.variance, strict=True):
    print(f"{snr:5g}{bias:12.3f}{variance:14.3f}")
assert score.loss <= 1.1

# %% Look at it: what the network makes of T2, beside the bound
axes = plt.figure(figsize=(6, 4), layout="constrained").subplots()
at_20 = list(audit.snr).index(20)
truth = 1e3 * audit.truth[:, 0]
for values, colour, label in (
    (np.sqrt(audit.variance[at_20][:, 0]), "#0072B2", "network, standard deviation"),
    (np.abs(audit.bias[at_20][:, 0]), "#999999", "network, |bias|"),
    (np.sqrt(audit.crb[:, 0]) / 20, "#D55E00", "√CRB"),
):
    axes.plot(truth, 1e3 * values, ".", ms=3, color=colour, label=label)
axes.set(
    xlabel="$T_2$ (ms)", ylabel="error of $T_2$ at SNR 20 (ms)", yscale="log", ylim=(0.1, None)
)
axes.legend()
path = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()) / "multi_echo_spin_echo.png"
axes.figure.savefig(path, dpi=150)
print(f"picture: {path}")
