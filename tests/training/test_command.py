"""The commands and the configs as shipped: one line to train, the same line to go on, one line for a mistake."""

import runpy
import sys
import tomllib
import warnings
from pathlib import Path

import pytest

from refiners.cli import train as command
from refiners.cli.errors import reported_errors
from refiners.foundationals.scenes import score
from refiners.training import ConfigError, NonFiniteError, TrainingInterrupted
from refiners.training.data.pictures import decode, read_folder, with_captions
from refiners.training.recipes import registry
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


def test_the_pictures_as_shipped_show_what_their_captions_say() -> None:
    hearts = with_captions(read_folder(ROOT / "configs" / "pictures" / "hearts"), "stop")
    everything = with_captions(read_folder(ROOT / "configs" / "pictures"), "stop")
    assert (len(hearts), len(everything)) == (24, 72)
    captions = [str(picture.caption) for picture in everything]
    assert sum("heart" in caption for caption in captions) == len(hearts)
    scores = score([decode(picture.read(), picture.name) for picture in everything], captions)
    assert scores.things > 0.98 and scores.places > 0.98, scores


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_config_trains_as_shipped_but_on_a_small_model_and_shortly(
    name: str, tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (ROOT / "configs" / name).read_text().splitlines()
    changes = {
        "base = ": f'base = "{model_folder}"',
        "duration = ": 'duration = "3:step"',
        "warmup_steps = ": "",
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
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(ROOT / "scripts" / "training" / SCRIPTS[name]), run_name="__main__")
        assert caught.value.code == 0
    assert {path.name for path in (tmp_path / "out" / "checkpoints").iterdir()} == {"step-00000002", "step-00000003"}
    assert list((tmp_path / "out" / "samples").iterdir()) and list((tmp_path / "out" / "logs").iterdir())


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object, recipe: str = "lora") -> int:
    """The exit code of a script of a recipe."""
    monkeypatch.setattr(sys, "argv", ["train", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        command.main(recipe=recipe)
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "config.toml: there is no such config file"),
        ('recipe = "lora"\n[training]\nduration = 1', "config.toml: training.duration: 1 is no period"),
        (GOOD.format('device = "cuda:99"'), "device = 'cuda:99' means GPU 99, but this machine has"),
        (GOOD.format('device = "gpu"'), "device = 'gpu' is none; write"),
        (GOOD.format('device = "meta"'), 'device = "meta" holds no weights; write'),
        (GOOD.format('device = "xpu"'), "device 'xpu' is not available on this machine"),
        (GOOD.format(""), "pictures: there is no such folder of pictures; give one that exists"),
        ('recipe = "finetune"\n', "recipe = 'finetune': it should be 'lora'"),
    ],
)
def test_a_mistake_is_a_message_like_that_of_any_command_and_not_a_traceback(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    text: str | None,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.toml"
    if text is not None:
        path.write_text(text)
    assert run(monkeypatch, path) == 1
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("error: ") for line in lines) and sum(message in line for line in lines) == 1
    monkeypatch.setattr(sys, "argv", ["train", str(path), "--debug"])
    with pytest.raises((ValueError, FileNotFoundError)):
        command.main(recipe="lora")


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ConfigError("a: this\na: that"), 1, "error: a: this\nerror: a: that\n"),
        (NonFiniteError("step 3 was not made"), 1, "error: step 3 was not made\n"),
        (
            OSError(28, "No space left on device", "a.png"),
            1,
            "error: [Errno 28] No space left on device: 'a.png'; make room on the disk, and give the same command "
            "again\n",
        ),
        (OSError(30, "Read-only file system"), 1, "error: [Errno 30] Read-only file system\n"),
        (ModuleNotFoundError("Prodigy comes with prodigyopt"), 1, "error: Prodigy comes with prodigyopt\n"),
        (
            ModuleNotFoundError("No module named 'pydantic'", name="pydantic"),
            1,
            "error: this needs pydantic, which is not installed: pip install 'refiners[training]'\n",
        ),
        (
            RuntimeError("CUDA out of memory."),
            1,
            f"error: there is not enough memory (CUDA out of memory.); {command.LESS_MEMORY}\n",
        ),
        (KeyboardInterrupt(), 130, "stopped; the same command goes on from the last checkpoint\n"),
        (
            TrainingInterrupted(4, 15, Path("out")),
            143,
            "stopped by SIGTERM after step 4, which is saved in out; the same command goes on from there\n",
        ),
    ],
)
def test_each_end_has_its_words_and_its_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, told: str
) -> None:
    def fail(config: str, recipe: str | None) -> None:
        raise error

    monkeypatch.setattr(registry, "train", fail)
    assert run(monkeypatch, "config.toml") == code
    assert capsys.readouterr().err == told


def test_a_warning_is_a_line_without_the_place_in_the_code() -> None:
    form, place = warnings.formatwarning, (UserWarning, "pictures.py", 7)
    for debug in (False, True):
        with reported_errors(debug):
            line = warnings.formatwarning("2 pictures\nwere left out", *place)
        assert (line == "warning: 2 pictures were left out\n") is not debug
    assert warnings.formatwarning is form


def test_an_error_that_is_a_bug_goes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    for bug in (RuntimeError("shapes do not fit"), ModuleNotFoundError("No module named 'x'", name="x"), KeyError("a")):

        def fail(config: str, recipe: str | None, bug: Exception = bug) -> None:
            raise bug

        monkeypatch.setattr(registry, "train", fail)
        monkeypatch.setattr(sys, "argv", ["train", "config.toml"])
        with pytest.raises(type(bug)):
            command.main(recipe="lora")
