"""Learning rates over time, as pure functions of the step: nothing to save, nothing to restore."""

import math

from torch.optim import Optimizer

from refiners.training.config import SchedulerConfig


def rate_factor(config: SchedulerConfig, step: int, total_steps: int) -> float:
    """What to multiply the learning rate with for step number `step`, 0 … total_steps - 1.

    >>> [round(rate_factor(SchedulerConfig(scheduler_type="linear", warmup_steps=2), step, 6), 2) for step in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    behind = step - config.warmup_steps
    if config.scheduler_type == "step":
        return config.gamma ** (behind // config.step_size)
    if config.scheduler_type == "constant":
        return 1.0
    share = behind / max(total_steps - config.warmup_steps, 1)
    fallen = (1 - math.cos(math.pi * min(share, 1))) / 2 if config.scheduler_type == "cosine" else min(share, 1)
    return 1 - (1 - config.final_factor) * fallen


def set_learning_rate(optimizer: Optimizer, factor: float) -> None:
    """Set the rate of each group to `factor` times what it was made with."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
