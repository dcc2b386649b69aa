"""The commands and the configs as shipped: one line to train, the same line to go on, one line for a mistake."""

import re
import runpy
import sys
import tomllib
from pathlib import Path

import pytest

from refiners.training.command import main
from refiners.training.recipes.registry import RECIPES

ROOT = Path(__file__).parents[2]
SCRIPTS = {
    "finetune-lora.toml": "finetune-ldm-lora.py",
    "finetune.toml": "finetune-ldm.py",
    "dreambooth.toml": "dreambooth.py",
    "textual-inversion.toml": "textual-inversion.py",
}

GOOD = """
recipe = "lora"
[training]
duration = "1:step"
{}
[dataset]
folder = "pictures"
[checkpointing]
save_folder = "out"
"""


def test_every_script_has_its_config_and_every_recipe_one_that_is_valid() -> None:
    configs = {path.name: path for path in (ROOT / "configs").glob("*.toml")}
    assert SCRIPTS.keys() <= configs.keys()
    assert sorted(path.name for path in (ROOT / "scripts" / "training").iterdir()) == sorted(SCRIPTS.values())
    recipes = {name: tomllib.loads(path.read_text())["recipe"] for name, path in configs.items()}
    assert sorted(recipes.values()) == sorted(RECIPES)
    for name, recipe in recipes.items():
        RECIPES[recipe].config.load(configs[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_config_trains_as_shipped_but_on_a_small_model_and_shortly(
    name: str, tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (ROOT / "configs" / name).read_text().splitlines()
    changes = {
        "base = ": f'base = "{model_folder}"',
        "duration = ": 'duration = "3:step"',
        "save_folder = ": f'save_folder = "{tmp_path / "out"}"',
        "save_interval = ": 'save_interval = "2:step"',
        "device = ": 'device = "cpu"',
        "prior_images = ": "prior_images = 2\nnum_inference_steps = 2",
        "prompts = ": 'prompts = ["a red heart"]\nnum_inference_steps = 2',
        "num_inference_steps = ": "",
    }
    for start, line in changes.items():
        lines = [line if each.startswith(start) else each for each in lines]
    config = tmp_path / name
    config.write_text("\n".join(lines))
    monkeypatch.chdir(ROOT)
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["train", str(config)])
        runpy.run_path(str(ROOT / "scripts" / "training" / SCRIPTS[name]), run_name="__main__")
    assert {path.name for path in (tmp_path / "out" / "checkpoints").iterdir()} == {"step-00000002", "step-00000003"}
    assert list((tmp_path / "out" / "samples").iterdir()) and list((tmp_path / "out" / "logs").iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "FileNotFoundError: .*there is no such config file"),
        ('recipe = "lora"\n[training]\nduration = 1', "ConfigError: .*training.duration: 1 is no period"),
        (GOOD.format('device = "cuda:99"'), "ValueError: device = 'cuda:99' means GPU 99, but this machine has"),
        (GOOD.format('device = "gpu"'), "ValueError: device = 'gpu' is none; write"),
        ('recipe = "finetune"\n', "recipe = 'finetune': it should be 'lora'"),
    ],
)
def test_a_mistake_is_a_message_and_not_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, message: str
) -> None:
    path = tmp_path / "config.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as caught:
        main([str(path)], recipe="lora")
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert re.search(message, error) and "Traceback" not in error
    with pytest.raises((ValueError, FileNotFoundError)):
        main([str(path), "--debug"], recipe="lora")
