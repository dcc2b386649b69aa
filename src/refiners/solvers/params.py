"""What a solver can be told about the model it samples from, and how its steps should lie."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from refiners.fluxion.checks import instance_of, real_number, whole_number


class Choice(StrEnum):
    """An enum whose values are the spellings of diffusers' scheduler_config.json, and whose errors list them."""

    @classmethod
    def _missing_(cls, value: object) -> None:
        raise ValueError(f"{value!r} is no {cls.__name__}; choose from {', '.join(cls)}")


class TimestepSpacing(Choice):
    """Where the steps lie among the training timesteps 0 … T-1 (arXiv 2305.08891, table 2)."""

    LINSPACE = "linspace"
    LEADING = "leading"
    TRAILING = "trailing"


class NoiseSchedule(Choice):
    """How the diffusion rates (the betas) grow: evenly, evenly in their roots, or so that the signal is a cosine."""

    UNIFORM = "linear"
    QUADRATIC = "scaled_linear"
    COSINE = "squaredcos_cap_v2"


class ModelPredictionType(Choice):
    """What the model was trained to tell: noise, velocity (arXiv 2202.00512, appendix D), or the clean sample."""

    NOISE = "epsilon"
    VELOCITY = "v_prediction"
    SAMPLE = "sample"


class SigmaSchedule(Choice):
    """Noise levels that replace those of the timestep spacing."""

    KARRAS = "karras"


@dataclass(frozen=True, kw_only=True)
class SolverParams:
    """The training schedule of the model, and how to walk it; the defaults are those of Stable Diffusion.

    None means the solver's own choice, for `timesteps_spacing`, `timesteps_offset` and `sde_variance`.

    num_train_timesteps: T; timesteps go from T-1, the noisiest, to 0.
    timesteps_offset: added to each timestep, by leading spacing only.
    custom_timesteps: whole, falling, one for each step; they replace the spacing.
    initial_diffusion_rate, final_diffusion_rate: the betas at timestep 0 and T-1, in (0, 1); the cosine schedule has
        its own.
    sigma_schedule: None keeps the noise levels that belong to the timesteps.
    sde_variance: share of fresh noise in a step, from 0 (an ODE) to 1 (the full SDE); DDIM's eta.
    ends_clean: whether the last step ends without any noise, or with that of timestep 0. The original Stable
        Diffusion's DDIM does the latter.

    Raises ValueError if a value is outside its range.
    """

    num_train_timesteps: int = 1000
    timesteps_spacing: TimestepSpacing | None = None
    timesteps_offset: int | None = None
    custom_timesteps: Sequence[int] | None = None
    initial_diffusion_rate: float = 8.5e-4
    final_diffusion_rate: float = 1.2e-2
    noise_schedule: NoiseSchedule = NoiseSchedule.QUADRATIC
    sigma_schedule: SigmaSchedule | None = None
    model_prediction_type: ModelPredictionType = ModelPredictionType.NOISE
    rescale_to_zero_terminal_snr: bool = False
    sde_variance: float | None = None
    ends_clean: bool = True

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_numbers()
        self._check_custom_timesteps()

    def _check_choices(self) -> None:
        NoiseSchedule(self.noise_schedule)
        ModelPredictionType(self.model_prediction_type)
        if self.timesteps_spacing is not None:
            TimestepSpacing(self.timesteps_spacing)
        if self.sigma_schedule is not None:
            SigmaSchedule(self.sigma_schedule)

    def _check_numbers(self) -> None:
        if whole_number(self.num_train_timesteps, "num_train_timesteps") < 1:
            raise ValueError(f"num_train_timesteps should be at least 1, but it is {self.num_train_timesteps}")
        initial = real_number(self.initial_diffusion_rate, "initial_diffusion_rate")
        final = real_number(self.final_diffusion_rate, "final_diffusion_rate")
        if not 0 < initial <= final < 1:
            raise ValueError(
                f"diffusion rates should rise within (0, 1), but initial_diffusion_rate is {initial} and "
                f"final_diffusion_rate is {final}"
            )
        if self.timesteps_offset is not None and whole_number(self.timesteps_offset, "timesteps_offset") < 0:
            raise ValueError(f"timesteps_offset should not be negative, but it is {self.timesteps_offset}")
        if self.sde_variance is not None and not 0 <= real_number(self.sde_variance, "sde_variance") <= 1:
            raise ValueError(f"sde_variance should be from 0 (an ODE) to 1 (an SDE), but it is {self.sde_variance}")

    def _check_custom_timesteps(self) -> None:
        if self.custom_timesteps is None:
            return
        if self.sigma_schedule is not None:
            raise ValueError(
                f"custom_timesteps and sigma_schedule={self.sigma_schedule} both set the noise levels; give one"
            )
        instance_of(self.custom_timesteps, Sequence, "custom_timesteps", "a list or tuple of timesteps")
        steps = [whole_number(step, "each of custom_timesteps") for step in self.custom_timesteps]
        if steps and not (self.num_train_timesteps > steps[0] and steps[-1] >= 0):
            raise ValueError(
                f"custom_timesteps should lie in 0 … {self.num_train_timesteps - 1}, but they go from {steps[0]} to "
                f"{steps[-1]}"
            )
        for before, after in pairwise(steps):
            if after >= before:
                raise ValueError(f"custom_timesteps should fall, but {before} is followed by {after}; sort them")
