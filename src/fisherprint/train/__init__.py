"""Training: losses, augmentation by M0 and noise, and the one loop (§2.2, §2.6)."""

from fisherprint.train.augmentation import augment, extra_inputs
from fisherprint.train.config import LossName, Samples, TrainingConfig
from fisherprint.train.loop import (
    DivergedError,
    Epoch,
    State,
    compilable,
    train,
)
from fisherprint.train.losses import (
    RELATIVE_FLOOR,
    bayesian_loss,
    bias_reduced_loss,
    crb_loss,
    mse_loss,
    relative_loss,
)
from fisherprint.train.ranks import ALONE, Ranks, alone, together

__all__ = [
    "ALONE",
    "RELATIVE_FLOOR",
    "DivergedError",
    "Epoch",
    "LossName",
    "Ranks",
    "Samples",
    "State",
    "TrainingConfig",
    "alone",
    "augment",
    "bayesian_loss",
    "bias_reduced_loss",
    "compilable",
    "crb_loss",
    "extra_inputs",
    "mse_loss",
    "relative_loss",
    "together",
    "train",
]
