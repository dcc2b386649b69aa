"""Mistakes in a config are found before anything is loaded, each named in one line."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from training_specimens import config

from refiners.training import ConfigError, TrainerConfig, joined
from refiners.training.distributed import Process
from refiners.training.recipes import registry
from refiners.training.recipes.config import LatentDiffusionConfig
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
    "true for a number": (
        {"training": {"batch_size": True}},
        "training.batch_size = True: it should be a valid integer",
    ),
    "a fraction for a count": ({"training": {"seed": 1.0}}, "training.seed = 1.0: it should be a valid integer"),
    "true for a rate": ({"optimizer": {"learning_rate": True}}, "optimizer.learning_rate = True: it should be a valid"),
    "a number for true": ({"logging": {"progress": 1}}, "logging.progress = 1: it should be a valid boolean"),
    "a text for a number": (
        {"training": {"ema_decay": "0.9"}},
        "training.ema_decay = '0.9': it should be a valid number",
    ),
    "no path": ({"checkpointing": {"save_folder": ""}}, "checkpointing.save_folder: '' is no path"),
    "a file for a folder": ({"checkpointing": {"save_folder": __file__}}, "test_config.py' is a file; name a folder"),
    "a number for a path": ({"checkpointing": {"save_folder": 3}}, "checkpointing.save_folder: 3 is no path"),
    "a value for a section": ({"training": 3}, r"training = 3: it should be a section, \[training\]"),
    "three betas": ({"optimizer": {"betas": [0.9, 0.9, 0.9]}}, r"betas: \[0.9, 0.9, 0.9\] should be two numbers"),
    "one beta": ({"optimizer": {"betas": 0.9}}, "optimizer.betas = 0.9: it should be an array"),
    "true among betas": (
        {"optimizer": {"betas": [True, 0.9]}},
        "optimizer.betas.0 = True: it should be a valid number",
    ),
    "what SGD lacks": (
        {"optimizer": {"optimizer": "SGD", "betas": [0.9, 0.9]}},
        "optimizer: the optimizer SGD has no setting 'betas'",
    ),
    "what the schedule lacks": (
        {"scheduler": {"scheduler_type": "cosine", "gamma": 0.5}},
        'gamma = 0.5 means nothing with scheduler_type = "cosine"',
    ),
    "two rates for one that finds its own": (
        {"optimizer": {"optimizer": "Prodigy", "learning_rate": 1.0, "text_encoder_learning_rate": 0.5}},
        "Prodigy finds one rate for all, but text_encoder_learning_rate = 0.5 and learning_rate = 1.0; leave the first",
    ),
    "no device": ({"training": {"device": ""}}, "training.device = ''"),
}
RECIPE_MISTAKES: dict[str, tuple[str, dict[str, Any], str]] = {
    "a path for a section": (
        "lora",
        {"models": {"unet": "a.safetensors"}},
        r"it should be a section, \[models.unet\]",
    ),
    "weights that are not there": (
        "lora",
        {"models": {"unet": {"checkpoint": "nowhere.safetensors"}}},
        "'nowhere.safetensors': there is no such file",
    ),
    "a target that is no array": (
        "lora",
        {"lora": {"unet_targets": "Attention"}},
        "unet_targets = 'Attention': it should be",
    ),
    "no targets": ("lora", {"lora": {"unet_targets": []}}, "lora: there is nothing to adapt"),
    "no layers": ("lora", {"lora": {"layers": []}}, "lora: there is nothing to adapt"),
    "a folder in a name": ("lora", {"lora": {"name": "a/b"}}, "lora.name: 'a/b' names no result"),
    "a name that is taken": ("finetune", {"finetune": {"name": "checkpoints"}}, "'checkpoints' names no result"),
    "a trigger that is none": (
        "lora",
        {"lora": {"use_only_trigger_probability": 0.5}},
        "but there is no trigger_phrase to stand alone",
    ),
    "no timesteps": (
        "lora",
        {"latent_diffusion": {"first_timestep": 5, "end_timestep": 5}},
        "first_timestep = 5 should be below",
    ),
    "noise predicted from noise": (
        "lora",
        {"latent_diffusion": {"prediction_type": "epsilon", "zero_terminal_snr": True}},
        "exclude each other",
    ),
    "held out for nothing": (
        "lora",
        {"dataset": {"held_out": 3}},
        "dataset.held_out is for evaluations, but there are none",
    ),
    "prompts for nothing": (
        "lora",
        {"test_diffusion": {"prompts": ["a"]}},
        "test_diffusion.prompts is for evaluations, but there are none",
    ),
    "one prompt that is no array": (
        "lora",
        {"test_diffusion": {"prompts": "a"}},
        "prompts = 'a': it should be an array",
    ),
    "a picture that is not there": (
        "t2i_adapter",
        {"test_diffusion": {"conditioning": ["a.png"]}},
        "conditioning.0: 'a.png': there is no such file",
    ),
    "prompts without pictures": (
        "t2i_adapter",
        {"test_diffusion": {"prompts": ["a", "b"]}, "training": {"evaluation_interval": "1:epoch"}},
        "names 0 pictures, but this recipe needs 2",
    ),
    "scenes judged without a lead": (
        "lora",
        {"dataset": {"folder": None, "scenes": {"judged": 4}}, "training": {"evaluation_interval": "1:epoch"}},
        "dataset.scenes.judged is for recipes whose adapter is led by pictures",
    ),
    "a split of a folder": ("lora", {"dataset": {"split": "test"}}, "split = 'test' is for data from `hf_repo`"),
    "masks of scenes": (
        "lora",
        {"dataset": {"folder": None, "scenes": {}, "mask_folder": "m"}},
        "mask_folder = 'm' is for data from `folder`",
    ),
    "no source of data": ("lora", {"dataset": {"folder": None}}, "needs one of `folder`, `hf_repo` and `scenes`"),
    "a rate of what does not train": (
        "lora",
        {"optimizer": {"text_encoder_learning_rate": 0.1}},
        "but nothing in the text encoder trains",
    ),
    "the same of a UNet": (
        "finetune",
        {"optimizer": {"text_encoder_learning_rate": 0.1}},
        "but nothing in the text encoder trains",
    ),
    "a probability that is true": (
        "lora",
        {"dataset": {"flip_probability": True}},
        "flip_probability = True: it should be",
    ),
    "a class without a prompt": (
        "dreambooth",
        {"dreambooth": {"instance_prompt": "a", "prior_images": 3}},
        "prior_images = 3 need a class_prompt",
    ),
    "a folder for no pictures": (
        "dreambooth",
        {"dreambooth": {"instance_prompt": "a", "prior_folder": "p"}},
        "but prior_images is 0",
    ),
    "a trigger before the class": (
        "dreambooth",
        {"dreambooth": {"instance_prompt": "a"}, "lora": {"trigger_phrase": "x"}},
        "would stand before the class as well",
    ),
    "a caption that is not used": (
        "dreambooth",
        {"dreambooth": {"instance_prompt": "a"}, "dataset": {"default_caption": "x"}},
        "this recipe makes its own captions",
    ),
    "a template without a place": (
        "textual_inversion",
        {"textual_inversion": {"initial_text": "a", "templates": ["x"]}},
        "'x' has no {} in the place",
    ),
    "no template": (
        "textual_inversion",
        {"textual_inversion": {"initial_text": "a", "templates": []}},
        "there is no template",
    ),
}


def changed(change: dict[str, Any]) -> dict[str, Any]:
    """The good config with other settings in its sections."""

    def one(name: str) -> Any:
        new = change.get(name, {})
        return {**GOOD.get(name, {}), **new} if isinstance(new, dict) else new

    return {name: one(name) for name in {**GOOD, **change}}


@pytest.mark.parametrize(("change", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        TrainerConfig.read(changed(change))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(("recipe", "change", "message"), RECIPE_MISTAKES.values(), ids=RECIPE_MISTAKES)
def test_a_mistake_in_a_recipe_is_named(recipe: str, change: dict[str, Any], message: str) -> None:
    table = changed({**change, "dataset": {"folder": "pictures", **change.get("dataset", {})}})
    with pytest.raises(ConfigError, match=message) as caught:
        RECIPES[recipe].config.read(table)
    assert len(str(caught.value).splitlines()) == 1


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainerConfig.read({"training": {"seed": -1, "batch_size": 0}, "wandb": {"mode": "on"}})
    lines = str(caught.value).splitlines()
    assert len(lines) == 5 and any("checkpointing is missing" in line for line in lines)


def test_a_path_may_begin_with_the_home_folder_and_a_file_with_a_mark(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('[training]\nduration = "1:epoch"\n[checkpointing]\nsave_folder = "~/out"\n', encoding="utf-8-sig")
    assert TrainerConfig.load(path).checkpointing.save_folder == Path.home() / "out"


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
    [
        ("", "names no recipe"),
        ('recipe = "lorra"', "no recipe 'lorra'; did you mean 'lora'"),
        ("recipe = []", r"no recipe \[\]; choose from"),
        ("=", "no TOML file"),
    ],
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
    table = changed(
        {
            "dataset": {"folder": "a", "held_out": 1},
            "dreambooth": {"instance_prompt": "a sks dog"},
            "training": {"evaluation_interval": "1:epoch"},
        }
    )
    with pytest.raises(ConfigError, match=r"dataset\.held_out: the few pictures of a subject"):
        RECIPES["dreambooth"].config.read(table)


def test_a_data_set_has_one_source(tmp_path: Path) -> None:
    table = {**GOOD, "dataset": {"folder": "a", "hf_repo": "b"}}
    with pytest.raises(ConfigError, match="one of `folder`, `hf_repo` and `scenes`, and not two"):
        RECIPES["lora"].config.read(table)


def test_a_batch_that_cannot_be_shared_out_is_told_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = config(tmp_path, training={"batch_size": 4}).training
    assert [shared.share_of(count) for count in (1, 2, 4)] == [4, 2, 1]
    with pytest.raises(ConfigError, match=r"training\.batch_size = 4 cannot be shared out evenly by 3 processes"):
        shared.share_of(3)
    monkeypatch.setattr(registry, "joined", lambda device: nullcontext(Process(0, 3)))
    path = tmp_path / "config.toml"
    path.write_text(
        'recipe = "lora"\ntraining = {duration = "1:epoch", batch_size = 4}\ndataset.folder = "nowhere"\n'
        'checkpointing.save_folder = "out"\n'
    )
    with pytest.raises(ConfigError, match=r"training\.batch_size = 4 cannot be shared out evenly by 3 processes"):
        train(path)


def test_processes_do_not_share_a_device_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="device = 'cuda:1' puts all 2 processes on one GPU"), joined("cuda:1"):
        pass


def test_timesteps_are_those_of_the_model() -> None:
    assert LatentDiffusionConfig().timesteps_of(50) == (0, 50)
    assert LatentDiffusionConfig(first_timestep=10, end_timestep=50).timesteps_of(50) == (10, 50)
    with pytest.raises(
        ConfigError, match=r"latent_diffusion\.end_timestep = 2000 is beyond the 1000 timesteps of this"
    ):
        LatentDiffusionConfig(end_timestep=2000).timesteps_of(1000)
    with pytest.raises(ConfigError, match=r"latent_diffusion\.first_timestep = 1000 is beyond the 1000 timesteps of"):
        LatentDiffusionConfig(first_timestep=1000).timesteps_of(1000)
