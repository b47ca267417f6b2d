"""What a pulse train can tell: the bound of each parameter, from all samples and in a subspace."""

# %% A train, a model, and a tissue in SI units
import numpy as np

import fisherprint as fp
from fisherprint import sequence

train = sequence.bundled()
model = fp.TwoPool(train)
white_matter = {
    **{"m0s": 0.212, "T1": 0.96, "T2f": 76.9e-3, "Rx": 13.6, "T2s": 12.5e-6},
    **{"B0": 0.0, "B1": 1.0},
}
theta = np.array([[white_matter[name] for name in model.names]])

# %% Signal and exact derivatives, then the bound for an SNR of 50, M0 = 1
out = model.simulate(theta)
noise_std = 1 / 50
bound = fp.crb(out.signal, out.jacobian, noise_std=noise_std)[0]

# %% The subspace that a reconstruction would use, from signals of the paper's prior
prior = fp.parameters.paper_prior(model.names, repetition_time=train.repetition_time)
signals = model.signal(prior.sample(1000, rng=np.random.default_rng(0)))
basis = fp.subspace.fit(signals, rank=13)
coefficients = basis.compress(out.signal), basis.compress(out.jacobian)
compressed = fp.crb(*coefficients, noise_std=noise_std)[0]

# %% Standard deviations that no unbiased estimator can undercut
print(f"13 coefficients hold {basis.energy(signals):.4%} of the energy")
print(f"{'':5}{'value':>12}{'√CRB signal':>14}{'√CRB of 13':>14}  unit")
for i, parameter in enumerate(model.parameters):
    numbers = parameter.display_factor * np.array(
        [theta[0, i], np.sqrt(bound[i]), np.sqrt(compressed[i])]
    )
    row = "".join(f"{x:{w}.4g}" for x, w in zip(numbers, (12, 14, 14), strict=True))
    print(f"{parameter.name:5}{row}  {parameter.display_unit}")
