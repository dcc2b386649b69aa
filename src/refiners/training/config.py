"""The settings of any training: how long, by which optimizer, what is kept. Recipes add sections of their own."""

from typing import Any, Literal, cast

from pydantic import Field, field_validator, model_validator

from refiners.training.clock import Period, Unit
from refiners.training.optimizers import OPTIMIZERS, checked_optimizer
from refiners.training.settings import (
    ConfigError,
    FolderSetting,
    PeriodSetting,
    Section,
    TextSetting,
    TupleOf,
    nearest,
)


class TrainingConfig(Section):
    """The section `[training]`.

    batch_size: samples of one iteration, over all processes together.
    gradient_accumulation: iterations per step of the optimizer.
    clip_grad_norm: upper bound of the norm of all gradients together; None for none.
    precision: of the computation ("float32", or autocast to another); weights that train stay as they are.
    ema_decay: of the running mean of the weights, which samples and results are then made with; None for none.
    gradient_checkpointing: compute activations twice rather than keep them: less memory, more time.
    parallel: with several processes (torchrun): each with all weights ("ddp") or with a part of each ("fsdp").
    """

    duration: PeriodSetting
    seed: int = Field(default=0, ge=0, lt=2**63)
    device: TextSetting = "auto"
    batch_size: int = Field(default=1, ge=1)
    gradient_accumulation: PeriodSetting = Period(1, Unit.ITERATION)
    clip_grad_norm: float | None = Field(default=1.0, gt=0)
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    gradient_checkpointing: bool = False
    ema_decay: float | None = Field(default=None, ge=0, lt=1)
    parallel: Literal["ddp", "fsdp"] = "ddp"
    evaluation_interval: PeriodSetting | None = None
    evaluation_seed: int = Field(default=0, ge=0, lt=2**63)
    log_interval: PeriodSetting = Period(1, Unit.STEP)

    @field_validator("gradient_accumulation")
    @classmethod
    def _counts_iterations(cls, value: Period) -> Period:
        if value.unit is not Unit.ITERATION:
            raise ValueError(
                f'"{value}" should count iterations, since a step is what several of them add up to; write '
                f'"{value.number}:iteration"'
            )
        return value

    @model_validator(mode="after")
    def _precision_fits(self) -> "TrainingConfig":
        if self.parallel == "fsdp" and self.precision == "float16":
            raise ValueError('precision = "float16" has no loss scaling with parallel = "fsdp"; use "bfloat16"')
        return self

    def share_of(self, count: int) -> int:
        """Samples of an iteration for each of `count` processes. Raises ConfigError if they cannot be shared evenly."""
        share, rest = divmod(self.batch_size, count)
        if rest:
            raise ConfigError(
                f"training.batch_size = {self.batch_size} cannot be shared out evenly by {count} processes; make it a "
                "multiple"
            )
        return share


class OptimizerConfig(Section):
    """The section `[optimizer]`: None leaves a value to the optimizer's own default.

    learning_rate: of Prodigy it is a factor, 1 as a rule.
    text_encoder_learning_rate: of the text encoder, where it trains too; None for `learning_rate`.
    """

    optimizer: str = "AdamW"
    learning_rate: float = Field(default=1e-4, gt=0)
    text_encoder_learning_rate: float | None = Field(default=None, gt=0)
    betas: TupleOf[tuple[float, float]] | None = None
    eps: float | None = Field(default=None, ge=0)
    weight_decay: float | None = Field(default=None, ge=0)
    momentum: float | None = Field(default=None, ge=0, lt=1)

    @field_validator("optimizer")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if value not in OPTIMIZERS:
            raise ValueError(f"there is no optimizer {value!r}; {nearest(value, OPTIMIZERS)}")
        return value

    @property
    def own_settings(self) -> dict[str, Any]:
        """What not all optimizers have, by name; None for what is left to the optimizer."""
        return self.model_dump(exclude={"optimizer", "learning_rate", "text_encoder_learning_rate"})

    @field_validator("betas", mode="before")
    @classmethod
    def _are_two(cls, value: object) -> object:
        if isinstance(value, list | tuple) and len(cast("list[Any]", value)) != 2:
            raise ValueError(f"{value} should be two numbers, as in [0.9, 0.99]")
        return cast("Any", value)

    @field_validator("betas")
    @classmethod
    def _are_fractions(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not all(0 <= beta < 1 for beta in value):
            raise ValueError(f"betas should be from 0 to below 1, but they are {value}")
        return value

    @model_validator(mode="after")
    def _optimizer_has_them(self) -> "OptimizerConfig":
        if self.optimizer == "Prodigy" and self.text_encoder_learning_rate not in (None, self.learning_rate):
            raise ValueError(
                f"Prodigy finds one rate for all, but text_encoder_learning_rate = {self.text_encoder_learning_rate} "
                f"and learning_rate = {self.learning_rate}; leave the first out"
            )
        checked_optimizer(self.optimizer, **self.own_settings)
        return self


class SchedulerConfig(Section):
    """The section `[scheduler]`.

    How the learning rate goes on after `warmup_steps` in which it grows evenly from 0.

    scheduler_type: "constant"; "linear" and "cosine" fall to `final_factor` at the end of training; "step" multiplies
        by `gamma` every `step_size` steps.
    """

    scheduler_type: Literal["constant", "linear", "cosine", "step"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    final_factor: float = Field(default=0.0, ge=0, le=1)
    step_size: int = Field(default=1000, ge=1)
    gamma: float = Field(default=0.1, gt=0, le=1)

    @model_validator(mode="after")
    def _type_has_them(self) -> "SchedulerConfig":
        used = {"linear": ["final_factor"], "cosine": ["final_factor"], "step": ["step_size", "gamma"]}
        for name in ("final_factor", "step_size", "gamma"):
            value = getattr(self, name)
            if name not in used.get(self.scheduler_type, []) and value != type(self).model_fields[name].default:
                raise ValueError(
                    f'{name} = {value} means nothing with scheduler_type = "{self.scheduler_type}"; leave it out, or '
                    "choose another scheduler_type"
                )
        return self


class CheckpointingConfig(Section):
    """The section `[checkpointing]`.

    save_folder: checkpoints, logs, samples and results go below it.
    keep: how many checkpoints stay; older ones are deleted.
    resume: go on from the newest checkpoint in `save_folder`, if there is one; false begins anew, and the checkpoints
        of later steps that are there are deleted as soon as a new one is saved.
    allow_changes: resume even if settings that matter are not those that the checkpoint was made with.
    """

    save_folder: FolderSetting
    save_interval: PeriodSetting = Period(1, Unit.EPOCH)
    keep: int = Field(default=2, ge=1)
    resume: bool = True
    allow_changes: bool = False


class LoggingConfig(Section):
    """The section `[logging]`.

    TensorBoard's files lie in `<save_folder>/logs`.
    """

    tensorboard: bool = True
    progress: bool = True


class WandbConfig(Section):
    """The section `[wandb]`.

    Weights & Biases; needs `pip install wandb`.
    """

    mode: Literal["online", "offline", "disabled"] = "disabled"
    project: TextSetting = "refiners"
    entity: TextSetting | None = None


class TrainerConfig(Section):
    """What every training needs."""

    training: TrainingConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    checkpointing: CheckpointingConfig
    logging: LoggingConfig = LoggingConfig()
    wandb: WandbConfig = WandbConfig()


# Settings that may change between a checkpoint and the run that goes on from it: they do not bear on the weights to
# come, or (the duration) are changed on purpose.
FREE_TO_CHANGE = (
    "training.duration",
    "training.device",
    "training.parallel",
    "training.evaluation",
    "training.log_interval",
    "training.gradient_checkpointing",
    "checkpointing.",
    "logging.",
    "wandb.",
    "test_diffusion.",
    "dataset.folder",
    "dataset.conditioning_folder",
    "dataset.cache_folder",
    "dataset.scenes.judged",
)
