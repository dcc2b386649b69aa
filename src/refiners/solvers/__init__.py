"""Solvers: pure sampling arithmetic, from noise to clean samples; they know no model."""

from refiners.solvers.ddim import DDIM, DDPM
from refiners.solvers.dpm import DPMSolver
from refiners.solvers.euler import Euler, EulerAncestral
from refiners.solvers.heun import Heun
from refiners.solvers.lcm import LCM
from refiners.solvers.params import (
    ModelPredictionType,
    NoiseSchedule,
    SigmaSchedule,
    SolverParams,
    TimestepSpacing,
)
from refiners.solvers.registry import SOLVERS, solver_by_name
from refiners.solvers.solver import Solver
from refiners.solvers.unipc import UniPC

__all__ = [
    "DDIM",
    "DDPM",
    "LCM",
    "SOLVERS",
    "DPMSolver",
    "Euler",
    "EulerAncestral",
    "Heun",
    "ModelPredictionType",
    "NoiseSchedule",
    "SigmaSchedule",
    "Solver",
    "SolverParams",
    "TimestepSpacing",
    "UniPC",
    "solver_by_name",
]
