"""Design a short train for T1 and T2 of two tissues, and compare its bounds with the start's."""

# %%
from itertools import islice

import numpy as np

from fisherprint import bounds, design
from fisherprint.models import SinglePool

# %% Limits of the scanner, and a smooth random train within them
limits = design.Limits(
    flip_angle=(0.02, 1.2),  # rad
    pulse_duration=(200e-6, 500e-6),  # s
    rf_power=2e5,  # mean ω1² in (rad/s)²
    flip_angle_roughness=0.01,  # root mean square of the second difference, rad
)
start = design.random_start(limits, pulses=200, repetition_time=5e-3, rng=np.random.default_rng(1))

# %% What it shall see: √CRB/θ of T1 and T2 in two tissues; B0 and B1 unknown
model = SinglePool(start)  # T1, T2, B0, B1
theta = np.array([[0.9, 0.07, 0.0, 1.0], [1.6, 0.1, 0.0, 1.0]])  # s, s, rad/s, relative
goal = design.Goal(theta, {"T1": 1.0, "T2": 1.0})

# %% A few rounds, splines first; each keeps the best train within the limits
for state in islice(design.search(model, goal, limits, knots=(12, 24, None), iterations=25), 8):
    print(f"round {state.number}: cost {state.best_cost:.2f}, {state.evaluations} evaluations")
assert not limits.broken(state.best)

# %% √CRB at SNR 50 in one cycle of a second
for label, train in (("start", start), ("designed", state.best)):
    found = bounds.of(model.of(train), theta, noise_std=1 / 50)
    percent = 100 * found.root[:, :2] / theta[:, :2]
    print(f"{label}: T1 {percent[:, 0].round(1)} %, T2 {percent[:, 1].round(1)} %")
