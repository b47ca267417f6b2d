"""Pulse trains designed by their bound: flip angles and durations that minimize it (§2.1, §2.8).

The cost is a weighted sum of relative bounds over tissues and parameters,

    J = Σ_s v_s Σ_p w_p √CRB_p(θ_s) / θ_sp,

of the whole signal, of the K coefficients of the train's own SVD basis, or of both. Its slope by
every flip angle and duration is exact: through the inverse of the Fisher information, through the
basis as far as it depends on the train, and through the periodic signal and its derivatives by one
adjoint pass (`models.adjoint`).
"""

from fisherprint.design.goal import Cost, Goal, cost, require_seen
from fisherprint.design.limits import Limits, LimitsError
from fisherprint.design.rounds import Round, begin, random_start, search

__all__ = [
    "Cost",
    "Goal",
    "Limits",
    "LimitsError",
    "Round",
    "begin",
    "cost",
    "random_start",
    "require_seen",
    "search",
]
