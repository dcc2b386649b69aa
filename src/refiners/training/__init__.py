"""Training: a small trainer that resumes exactly, data, losses, and recipes for diffusion models."""

from refiners.training.clock import Clock, Period, Unit
from refiners.training.config import TrainerConfig
from refiners.training.distributed import Process, joined
from refiners.training.guard import NonFiniteError
from refiners.training.interruption import TrainingInterrupted
from refiners.training.losses import DiffusionLoss
from refiners.training.recomputation import recompute
from refiners.training.settings import ConfigError, Section
from refiners.training.targets import find_targets
from refiners.training.trainer import Batches, Callback, Trainer

__all__ = [
    "Batches",
    "Callback",
    "Clock",
    "ConfigError",
    "DiffusionLoss",
    "NonFiniteError",
    "Period",
    "Process",
    "Section",
    "Trainer",
    "TrainerConfig",
    "TrainingInterrupted",
    "Unit",
    "find_targets",
    "joined",
    "recompute",
]
