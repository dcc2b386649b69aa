"""Mistakes in a config are found before anything is loaded, each named in one line."""

from pathlib import Path
from typing import Any

import pytest
from training_specimens import config

from refiners.training import ConfigError, TrainerConfig
from refiners.training.recipes.registry import RECIPES, train
from refiners.training.settings import differences

GOOD: dict[str, Any] = {
    "training": {"duration": "1:epoch"},
    "checkpointing": {"save_folder": "out"},
}
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "typo in a setting": (
        {"training": {"batch_sise": 3}},
        r"\[training\] has no setting 'batch_sise'; did you mean 'batch_size'",
    ),
    "typo in a section": ({"optimiser": {}}, "has no setting 'optimiser'; did you mean 'optimizer'"),
    "a unit that is none": ({"training": {"duration": "3:steps"}}, "'3:steps' is no period"),
    "a number out of range": ({"training": {"batch_size": 0}}, "training.batch_size = 0: it should be greater than"),
    "a word for a number": ({"optimizer": {"learning_rate": "low"}}, "optimizer.learning_rate = 'low'"),
    "not a number": ({"optimizer": {"learning_rate": float("nan")}}, "optimizer.learning_rate = nan"),
    "an unknown optimizer": ({"optimizer": {"optimizer": "adamw"}}, "no optimizer 'adamw'; did you mean 'AdamW'"),
    "betas out of range": ({"optimizer": {"betas": [0.9, 1.0]}}, "betas should be from 0 to below 1"),
    "accumulation in steps": ({"training": {"gradient_accumulation": "4:step"}}, 'write "4:iteration"'),
    "fp16 with fsdp": ({"training": {"precision": "float16", "parallel": "fsdp"}}, 'use "bfloat16"'),
    "an unknown schedule": ({"scheduler": {"scheduler_type": "cosin"}}, "scheduler.scheduler_type = 'cosin'"),
    "no duration": ({"training": {"duration": None}}, "None is no period"),
}


@pytest.mark.parametrize(("change", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named(change: dict[str, Any], message: str) -> None:
    table = {name: {**GOOD.get(name, {}), **change.get(name, {})} for name in {**GOOD, **change}}
    with pytest.raises(ConfigError, match=message):
        TrainerConfig.read(table)


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainerConfig.read({"training": {"seed": -1, "batch_size": 0}, "wandb": {"mode": "on"}})
    lines = str(caught.value).splitlines()
    assert len(lines) == 5 and any("checkpointing is missing" in line for line in lines)


def test_a_file_is_named_with_its_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    with pytest.raises(FileNotFoundError, match="no such config file"):
        TrainerConfig.load(path)
    path.write_text("[training\n")
    with pytest.raises(ConfigError, match=r"config\.toml: this is no TOML file"):
        TrainerConfig.load(path)
    path.write_text("[training]\nduration = 3\n")
    with pytest.raises(ConfigError, match=r"config\.toml: training.duration: 3 is no period"):
        TrainerConfig.load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "names no recipe"), ('recipe = "lorra"', "no recipe 'lorra'; did you mean 'lora'"), ("=", "no TOML file")],
)
def test_a_recipe_has_to_be_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        train(path)


def test_a_dumped_config_reads_as_the_same_config(tmp_path: Path) -> None:
    first = config(tmp_path, training={"ema_decay": 0.99, "evaluation_interval": "2:epoch"})
    assert TrainerConfig.read(first.model_dump(mode="json")) == first
    changed = config(tmp_path, training={"ema_decay": 0.9})
    assert differences(first.model_dump(mode="json"), changed.model_dump(mode="json")) == {
        "training.ema_decay": (0.99, 0.9),
        "training.evaluation_interval": ("2:epoch", None),
    }


def test_pictures_of_a_subject_are_not_held_out() -> None:
    table = {**GOOD, "dataset": {"folder": "a", "held_out": 1}, "dreambooth": {"instance_prompt": "a sks dog"}}
    with pytest.raises(ConfigError, match=r"dataset\.held_out: the few pictures of a subject"):
        RECIPES["dreambooth"].config.read(table)


def test_a_data_set_has_one_source(tmp_path: Path) -> None:
    table = {**GOOD, "dataset": {"folder": "a", "hf_repo": "b"}}
    with pytest.raises(ConfigError, match="one of `folder`, `hf_repo` and `scenes`, and not two"):
        RECIPES["lora"].config.read(table)
