"""Signal models: parameters to signal and derivatives."""

from fisherprint.models.protocol import Fingerprints, SignalModel
from fisherprint.models.two_pool import TwoPool

__all__ = ["Fingerprints", "SignalModel", "TwoPool"]
