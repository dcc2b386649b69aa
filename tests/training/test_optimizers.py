"""Optimizers by name get the settings that were given, and no others; rates are functions of the step."""

from typing import Any

import pytest
import torch
from torch import nn

from refiners.training.config import OptimizerConfig, SchedulerConfig
from refiners.training.optimizers import OPTIMIZERS, groups_by_rate, make_optimizer
from refiners.training.schedules import rate_factor, set_learning_rate
from refiners.training.settings import ConfigError


def weight() -> nn.Parameter:
    return nn.Parameter(torch.ones(3))


def test_no_setting_is_mistaken_for_another() -> None:
    settings = OptimizerConfig(learning_rate=0.5, betas=(0.1, 0.2), eps=0.3, weight_decay=0.4)
    values = settings.model_dump(exclude={"optimizer", "learning_rate"})
    (group,) = make_optimizer("AdamW", [weight()], settings.learning_rate, **values).param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.5, (0.1, 0.2), 0.3, 0.4)


def test_what_is_not_given_is_the_optimizers_own() -> None:
    (group,) = make_optimizer("AdamW", [weight()], 1e-3, betas=None, eps=None, weight_decay=None).param_groups
    (theirs,) = torch.optim.AdamW([weight()], lr=1e-3).param_groups
    assert {name: group[name] for name in ("betas", "eps", "weight_decay")} == {
        name: theirs[name] for name in ("betas", "eps", "weight_decay")
    }


def test_a_setting_that_an_optimizer_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="SGD has no setting 'betas'; it has lr, momentum"):
        make_optimizer("SGD", [weight()], 1e-3, betas=(0.9, 0.99))


def installed(name: str) -> bool:
    try:
        __import__(OPTIMIZERS[name].module)
    except ModuleNotFoundError:
        return False
    return True


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_a_loss_or_says_what_to_install(name: str) -> None:
    if not installed(name):
        with pytest.raises(ModuleNotFoundError, match=f"pip install {OPTIMIZERS[name].package}"):
            make_optimizer(name, [weight()], 0.1)
        return
    parameter = weight()
    optimizer: Any = make_optimizer(name, [parameter], 1.0 if name == "Prodigy" else 0.1)
    if hasattr(optimizer, "train"):
        optimizer.train()
    for _ in range(30):
        loss = parameter.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert parameter.square().sum() < 3


def test_rates_warm_up_and_fall() -> None:
    def factors(**values: Any) -> list[float]:
        return [round(rate_factor(SchedulerConfig(**values), step, 8), 3) for step in range(8)]

    assert factors(warmup_steps=4) == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    assert factors(scheduler_type="linear", final_factor=0.2) == [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]
    assert factors(scheduler_type="cosine")[::4] == [1, 0.5]
    assert factors(scheduler_type="step", step_size=3) == [1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01]


def test_a_factor_is_of_the_rate_that_each_group_was_made_with() -> None:
    optimizer = make_optimizer("SGD", [{"params": [weight()], "lr": 0.5}, {"params": [weight()]}], 0.1)
    for factor in (0.1, 0.5):
        set_learning_rate(optimizer, factor)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.05]


def test_a_model_with_a_rate_of_its_own_is_a_group_of_its_own() -> None:
    parameters = {name: weight() for name in ("unet.a", "text_encoder.b", "unet.c", "text_encoder.d")}
    common, own = groups_by_rate(parameters, {"text_encoder": 0.1})
    assert list(map(id, common["params"])) == [id(parameters[name]) for name in ("unet.a", "unet.c")]
    assert list(map(id, own["params"])) == [id(parameters[name]) for name in ("text_encoder.b", "text_encoder.d")]
    optimizer = make_optimizer("SGD", [common, own], 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.1]
    (together,) = groups_by_rate(parameters, {"text_encoder": None})
    assert list(map(id, together["params"])) == list(map(id, parameters.values()))
    (alone,) = groups_by_rate({"text_encoder.b": parameters["text_encoder.b"]}, {"text_encoder": 0.1})
    assert alone["lr"] == 0.1


def test_a_rate_for_a_model_that_does_not_train_is_an_error() -> None:
    with pytest.raises(
        ConfigError, match=r"optimizer\.text_encoder_learning_rate = 0\.1, but no parameter of text_encoder"
    ):
        groups_by_rate({"unet.a": weight()}, {"text_encoder": 0.1})
