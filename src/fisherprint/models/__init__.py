"""Signal models: parameters to signal and derivatives."""

from fisherprint.models.cycle import compiled
from fisherprint.models.protocol import Fingerprints, SignalModel
from fisherprint.models.two_pool import SinglePool, TwoPool

__all__ = ["Fingerprints", "SignalModel", "SinglePool", "TwoPool", "compiled"]
