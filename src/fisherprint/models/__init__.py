"""Signal models: parameters to signal and derivatives."""

from typing import TYPE_CHECKING, Any

from fisherprint.models.cycle import compiled
from fisherprint.models.protocol import ControlSlopes, Fingerprints, PulsedModel, SignalModel
from fisherprint.models.two_pool import SinglePool, TwoPool

if TYPE_CHECKING:
    from fisherprint.models.autograd import TorchModel

__all__ = [
    "ControlSlopes",
    "Fingerprints",
    "PulsedModel",
    "SignalModel",
    "SinglePool",
    "TorchModel",
    "TwoPool",
    "compiled",
]


def __getattr__(name: str) -> Any:
    # torch takes seconds to load and the physics does not need it.
    if name == "TorchModel":
        from fisherprint.models.autograd import TorchModel

        return TorchModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
