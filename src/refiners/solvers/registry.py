"""Solvers by name, for command lines and configuration files."""

from refiners.fluxion.checks import instance_of
from refiners.solvers.ddim import DDIM, DDPM
from refiners.solvers.dpm import DPMSolver
from refiners.solvers.euler import Euler, EulerAncestral
from refiners.solvers.heun import Heun
from refiners.solvers.lcm import LCM
from refiners.solvers.solver import Solver
from refiners.solvers.unipc import UniPC

SOLVERS: dict[str, type[Solver]] = {
    "ddim": DDIM,
    "ddpm": DDPM,
    "dpm-solver": DPMSolver,
    "euler": Euler,
    "euler-ancestral": EulerAncestral,
    "heun": Heun,
    "lcm": LCM,
    "unipc": UniPC,
}


def solver_by_name(name: str) -> type[Solver]:
    """The solver class of that name, as in `SOLVERS` or as the class is called; case, - and _ do not matter.

    Raises ValueError, with all names, if there is none.

    >>> solver_by_name("euler-ancestral") is solver_by_name("EulerAncestral")
    True
    """
    instance_of(name, str, "the name of a solver", f"one of {', '.join(SOLVERS)}")
    for known, solver in SOLVERS.items():
        if _plain(known) == _plain(name):
            return solver
    raise ValueError(f"there is no solver {name!r}; choose from {', '.join(SOLVERS)}")


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")
