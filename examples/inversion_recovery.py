"""Any model: inversion recovery, from a torch function to a network near its bound.

The signal s(TI) = 1 − (1 + e) exp(−TI/T1) has two parameters, T1 and the inversion efficiency e;
its complex scale M0 is unknown as always. Autograd gives the bound, the bound the loss.
"""

# %% The model is a function and a list of parameters
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

INVERSION_TIMES = torch.logspace(np.log10(0.03), np.log10(5), 16, dtype=torch.float64)  # s
T1 = fp.Parameter("T1", "$T_1$", "s", (0.05, 10.0), "s")
EFFICIENCY = fp.Parameter("efficiency", "inversion efficiency", "", (0.0, 1.0))


def recovery(theta: torch.Tensor) -> torch.Tensor:
    t1, efficiency = theta
    return 1 - (1 + efficiency) * torch.exp(-INVERSION_TIMES / t1)


model = models.TorchModel(recovery, [T1, EFFICIENCY])

# %% The bound by autograd is that of derivatives by hand
theta = np.array([[0.4, 0.99], [1.1, 0.92], [2.8, 0.8]])
out = model.simulate(theta)
bound = fp.crb(out.signal, out.jacobian)
TI, t1, e = INVERSION_TIMES.numpy(), theta[:, :1], theta[:, 1:]
decay = np.exp(-TI / t1)
by_hand = fp.crb(1 - (1 + e) * decay, np.stack([-(1 + e) * decay * TI / t1**2, -decay], axis=-1))
worst = np.abs(bound / by_hand - 1).max()
print(f"bound by autograd against derivatives by hand: largest relative difference {worst:.1e}")
assert worst < 1e-6

# %% A data set with bounds, in a subspace
prior = fp.Prior({"T1": fp.Uniform(0.5, 2.5), "efficiency": fp.Uniform(0.8, 1.0)})
sizes = {"training": 20_000, "validation": 1000, "test": 500}
data = simulate.dataset(model, prior, sizes, basis=5, seed=0)
print(f"5 coefficients hold {data.energy:.6%} of the energy")


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

# %% Look at it: what the network makes of T1, beside the bound
axes = plt.figure(figsize=(6, 4), layout="constrained").subplots()
at_20 = list(audit.snr).index(20)
order = np.argsort(audit.truth[:, 0])
truth = audit.truth[order, 0]
std = np.sqrt(audit.variance[at_20][order, 0])
crb = np.sqrt(audit.crb[order, 0]) / 20
axes.plot(truth, 1e3 * std, ".", color="#0072B2", label="network, standard deviation")
axes.plot(truth, 1e3 * crb, ".", color="#D55E00", ms=3, label="√CRB")
axes.plot(
    truth,
    1e3 * np.abs(audit.bias[at_20][order, 0]),
    ".",
    color="#999999",
    ms=3,
    label="network, |bias|",
)
axes.set(xlabel="$T_1$ (s)", ylabel="error of $T_1$ at SNR 20 (ms)", yscale="log", ylim=(1, None))
axes.legend()
path = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()) / "inversion_recovery.png"
axes.figure.savefig(path, dpi=150)
print(f"picture: {path}")
