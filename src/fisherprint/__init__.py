"""Quantitative MRI in units of the Cramér-Rao bound: from a pulse train to parameter maps."""

from fisherprint import fisher, parameters, subspace
from fisherprint.fisher import SingularInformationError, crb
from fisherprint.models import Fingerprints, SignalModel, TwoPool
from fisherprint.parameters import Parameter, Prior, TruncatedNormal, Uniform
from fisherprint.sequence import PulseTrain
from fisherprint.subspace import Basis

__all__ = [
    "Basis",
    "Fingerprints",
    "Parameter",
    "Prior",
    "PulseTrain",
    "SignalModel",
    "SingularInformationError",
    "TruncatedNormal",
    "TwoPool",
    "Uniform",
    "crb",
    "fisher",
    "parameters",
    "subspace",
]
