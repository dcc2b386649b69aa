"""`refiners generate`: pictures, what is written into them, repeating them, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_specimens import FAST, fail, only_picture, pixels, python, succeed
from diffusion_specimens import small_folder
from PIL import Image, ImageDraw

from refiners.foundationals.latent_diffusion import StableDiffusion_1, StableDiffusion_1_Inpainting
from refiners.foundationals.latent_diffusion.lora import LoraWeights
from refiners.solvers import SOLVERS


@pytest.fixture
def model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Options that every run here has; files are written to the current folder."""
    monkeypatch.chdir(tmp_path)
    return ["--model", folder, *FAST]


def texts(path: Path | str) -> dict[str, Any]:
    with Image.open(path) as image:
        return {"parameters": image.info["parameters"], **json.loads(image.info["refiners"])}


def draw_inputs() -> None:
    image = Image.new("RGB", (64, 64), (20, 60, 200))
    ImageDraw.Draw(image).ellipse((8, 8, 40, 40), fill=(230, 40, 40))
    image.save("start.png")
    mask = Image.new("L", (64, 64), 0)
    ImageDraw.Draw(mask).rectangle((0, 0, 31, 63), fill=255)
    mask.save("mask.png")


def test_a_picture_is_what_the_model_makes(model: list[Any], folder: Path) -> None:
    output = succeed("generate", "A cute cat!", "--seed", 3, *model)
    assert output == "a-cute-cat-3.png  seed 3\n"
    expected = StableDiffusion_1.from_pretrained(folder).generate("A cute cat!", seed=3, num_inference_steps=2)[0]
    assert pixels(Path("a-cute-cat-3.png")) == expected.tobytes()


@pytest.mark.slow
def test_every_option_reaches_the_model(model: list[Any], folder: Path, lora: Path) -> None:
    draw_inputs()
    succeed(
        *["generate", "a cat", "--negative", "blurry", "--seed", 5, "--guidance", 3, "--solver", "euler"],
        *["--size", "72x64", "--init-image", "start.png", "--strength", 0.9, "--mask", "mask.png"],
        *["--lora", f"{lora}:0.5", "--tile-size", 32, "--dtype", "bfloat16", "--out", "cat.png", *model, "--steps", 4],
    )
    theirs = StableDiffusion_1.from_pretrained(folder, dtype=torch.bfloat16)
    LoraWeights(lora).patch(theirs, scale=0.5)
    expected = theirs.generate(
        "a cat",
        "blurry",
        seed=5,
        num_inference_steps=4,
        condition_scale=3,
        solver="euler",
        size=(64, 72),
        init_image=Image.open("start.png"),
        strength=0.9,
        mask=Image.open("mask.png"),
        tile_size=32,
    )[0]
    assert pixels(Path("cat.png")) == expected.tobytes()


def test_a_picture_carries_its_settings(model: list[Any], folder: Path, lora: Path) -> None:
    succeed(
        *["generate", "a café", "--negative", "dog", "--seed", 5, "--lora", f"{lora}:0.5", "--solver", "euler"],
        *["--out", "cat.png", *model],
    )
    written = texts("cat.png")
    assert written["settings"] == {
        "prompt": "a café",
        "negative": "dog",
        "seed": 5,
        "steps": 2,
        "guidance": 7.5,
        "solver": "euler",
        "size": "64x64",
        "init_image": None,
        "strength": 0.75,
        "mask": None,
        "loras": [f"{lora}:0.5"],
        "controls": [],
        "ip_adapter": None,
        "image_prompts": [],
        "image_encoder": None,
        "model": str(folder),
        "refiner": None,
        "device": "cpu",
        "dtype": "float32",
        "tile_size": None,
    }
    assert torch.__version__.startswith(written["torch"])
    assert list(written["files"]) == [str(lora)] and len(written["files"][str(lora)]) == 64
    assert written["parameters"].splitlines() == [
        "a café <lora:style:0.5>",
        "Negative prompt: dog",
        f"Steps: 2, Sampler: Euler, CFG scale: 7.5, Seed: 5, Size: 64x64, Model: sd, "
        f"Version: refiners {written['version']}",
    ]


def test_like_repeats_a_picture_bit_by_bit(model: list[Any], lora: Path) -> None:
    draw_inputs()
    succeed(
        *["generate", "a cat", "--lora", f"{lora}:0.7", "--init-image", "start.png", "--mask", "mask.png"],
        *["--solver", "euler-ancestral", "--out", "first.png", *model, "--steps", 3],
    )
    succeed("generate", "--like", "first.png", "--out", "second.png")
    assert Path("first.png").read_bytes() == Path("second.png").read_bytes()


@pytest.mark.slow
def test_options_come_before_what_a_picture_says(model: list[Any], lora: Path) -> None:
    succeed("generate", "a cat", "--seed", 1, "--lora", lora, "--out", "first.png", *model)
    succeed("generate", "a dog", "--like", "first.png", "--seed", 2, "--lora", "", "--size", "64x72", "--out", "b.png")
    succeed("generate", "a dog", "--seed", 2, "--size", "64x72", "--out", "c.png", *model)
    changed = texts("b.png")["settings"]
    assert (changed["prompt"], changed["seed"], changed["size"], changed["steps"]) == ("a dog", 2, "64x72", 2)
    assert pixels(Path("b.png")) == pixels(Path("c.png")) != pixels(Path("first.png"))


@pytest.mark.slow
def test_a_random_seed_is_printed_and_repeats(model: list[Any]) -> None:
    output = succeed("generate", "a cat", "--out", "first.png", *model)
    seed = int(output.split()[-1])
    succeed("generate", "a cat", "--seed", seed, "--out", "second.png", *model)
    assert Path("first.png").read_bytes() == Path("second.png").read_bytes()
    assert int(succeed("generate", "a cat", *model).split()[-1]) != seed


@pytest.mark.slow
def test_several_pictures_are_each_as_if_made_alone(model: list[Any]) -> None:
    succeed("generate", "a cat", "a dog", "--seed", 1, "--seed", 2, "--out", "{prompt}-{seed}-{number}.png", *model)
    succeed("generate", "a dog", "--seed", 2, "--out", "alone.png", *model)
    assert Path("a-cat-1-1.png").exists()
    assert Path("a-dog-2-2.png").read_bytes() == Path("alone.png").read_bytes()


@pytest.mark.slow
def test_names_of_pictures(model: list[Any]) -> None:
    succeed("generate", "a cat", "--seed", 1, "--out", "new/folder", *model)
    succeed("generate", "a cat", "--seed", 1, "--out", "new/folder", *model)
    assert sorted(path.name for path in Path("new/folder").iterdir()) == ["a-cat-1-2.png", "a-cat-1.png"]
    succeed("generate", "a cat", "--seed", 1, "--seed", 2, "--out", "x.png", *model)
    assert Path("x-1.png").exists() and Path("x-2.png").exists()
    succeed("generate", "", "--guidance", 1, "--seed", 1, "--out", "empty", *model)
    assert only_picture(Path("empty")).name == "picture-1.png"


@pytest.mark.slow
def test_an_inpainting_model_is_known_by_its_channels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    draw_inputs()
    folder = small_folder(tmp_path / "inpainting", StableDiffusion_1_Inpainting)
    options = ["--model", folder, *FAST, "--init-image", "start.png", "--seed", 1]
    succeed("generate", "a cat", "--mask", "mask.png", "--out", "cat.png", *options)
    expected = StableDiffusion_1_Inpainting.from_pretrained(folder).generate(
        "a cat", seed=1, num_inference_steps=2, init_image=Image.open("start.png"), mask=Image.open("mask.png")
    )[0]
    assert pixels(Path("cat.png")) == expected.tobytes()
    assert "give it --init-image and --mask" in fail("generate", "a cat", *options)


@pytest.mark.slow
def test_pictures_stand_the_right_way_up(model: list[Any]) -> None:
    draw_inputs()
    with Image.open("start.png") as image:
        turned = image.rotate(90)
        exif = Image.Exif()
        exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
        turned.save("turned.png", exif=exif)
    succeed("generate", "cat", "--seed", 1, "--init-image", "start.png", "--out", "a.png", *model)
    succeed("generate", "cat", "--seed", 1, "--init-image", "turned.png", "--out", "b.png", *model)
    assert pixels(Path("a.png")) == pixels(Path("b.png"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--solver", "dpm++"], "no solver 'dpm++'; choose from " + ", ".join(SOLVERS)),
        (["--size", "60x64"], "60x64 has no whole number of latents: sides must be multiples of 8"),
        (["--size", "64"], "the size '64' should be WIDTHxHEIGHT"),
        (["--steps", "0"], "from 1 to 1000"),
        (["--strength", "2", "--init-image", "start.png"], "strength is 2.0"),
        (["--mask", "mask.png"], "give --init-image too"),
        (["--init-image", "none.png"], "none.png: there is no such file"),
        (
            ["--strength", "0.5"],
            "a strength says how much of a picture to change, but there is none: give --init-image",
        ),
        (["--init-image", "text.png"], "text.png: this is no picture in a known format"),
        (["--init-image", "torn.png"], "torn.png: this picture is damaged, or cannot be read ("),
        (["--model", "none"], "'none' is no folder, no file, no repository"),
        (["--model", "none.safetensors"], "none.safetensors: there is no such file"),
        (["--model", "LORA"], "style.safetensors: this is no model, but a LoRA"),
        (["--lora", "none.safetensors"], "none.safetensors: there is no such file"),
        (["--lora", "LORA:strong"], "the scale of 'LORA:strong' should be a number"),
        (["--lora", "text.png"], "text.png: "),
        (["--device", "cuda"], "sees 0 CUDA devices here: use --device cpu"),
        (["--device", "gpu"], "no device 'gpu'; choose from auto, cpu, cuda, mps"),
        (["--device", "cpu:x"], "no device 'cpu:x'"),
        (["--dtype", "int8"], "no dtype 'int8'; choose from auto, float32"),
        (["--seed", "-1"], "the seed -1 should be from 0"),
        (["--seed", "1", "--seed", "2", "a dog", "a fish"], "3 prompts and 2 seeds"),
        (["--tile-size", "8"], "tiles need at least 32"),
        (["--out", "picture.jpg"], "pictures are written as .png"),
        (["--out", "nowhere/picture.png"], "the folder 'nowhere' does not exist"),
        (["--like", "start.png"], "no settings of refiners in it"),
        (["--like", "none.png"], "none.png: there is no such file"),
        ([" "], "the prompt is empty"),
    ],
)
def test_what_cannot_be_ends_in_one_line(
    model: list[Any], lora: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    draw_inputs()
    Path("text.png").write_text("this is a text, and no picture")
    Path("torn.png").write_bytes(Path("start.png").read_bytes()[:-40])
    line = fail("generate", "a cat", *model, *(option.replace("LORA", str(lora)) for option in options))
    assert message.replace("LORA", str(lora)) in line
    assert not list(Path().glob("a-cat*"))


def test_no_prompt_at_all_is_refused(model: list[Any]) -> None:
    assert "there is no prompt" in fail("generate", *model)
    assert "the prompt is empty" in fail("generate", "", *model)


@pytest.mark.slow
def test_a_file_that_changed_is_not_taken_for_the_same(model: list[Any], lora: Path) -> None:
    draw_inputs()
    succeed("generate", "a cat", "--init-image", "start.png", "--out", "first.png", *model)
    Image.new("RGB", (64, 64)).save("start.png")
    assert "start.png: this file is not the one" in fail("generate", "--like", "first.png", "--out", "b.png")
    succeed("generate", "--like", "first.png", "--init-image", "start.png", "--out", "b.png")
    assert pixels(Path("b.png")) != pixels(Path("first.png"))
    Path("start.png").unlink()
    assert "start.png: there is no such file" in fail("generate", "--like", "first.png", "--out", "c.png")


@pytest.mark.slow
def test_a_device_that_is_not_here_does_not_keep_from_repeating(
    model: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    succeed("generate", "a cat", "--out", "first.png", *model)
    rewrite("first.png", device="cuda")
    assert "made on cuda, which is not here" in succeed("generate", "--like", "first.png", "--out", "b.png")
    assert pixels(Path("b.png")) == pixels(Path("first.png"))


def rewrite(path: str, **changes: Any) -> None:
    from PIL.PngImagePlugin import PngInfo

    with Image.open(path) as image:
        image.load()
        content = json.loads(image.info["refiners"])
        content["settings"] |= changes
        info = PngInfo()
        info.add_text("refiners", json.dumps(content))
        image.save(path, pnginfo=info)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": "red"}, "does not know 'colour'"),
        ({"seed": "one"}, "'seed' cannot be 'one'"),
        ({"seed": True}, "'seed' cannot be True"),
        ({"loras": "x"}, "'loras' should be a list"),
        ({"loras": [1]}, "'loras' cannot be 1"),
        ({"model": None}, "'model' cannot be None"),
        ({"steps": 0}, "from 1 to 1000"),
    ],
)
def test_settings_in_a_picture_are_checked(model: list[Any], changes: dict[str, Any], message: str) -> None:
    succeed("generate", "a cat", "--out", "first.png", *model)
    rewrite("first.png", **changes)
    assert message in fail("generate", "--like", "first.png", "--out", "b.png")


@pytest.mark.slow
def test_another_process_makes_the_same_picture(folder: Path, lora: Path, tmp_path: Path) -> None:
    options = ["--model", folder, *FAST, "--seed", 3, "--lora", lora]
    for name in ("a.png", "b.png"):
        done = python("-m", "refiners.cli", "generate", "a cat", *options, "--out", name, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.slow
def test_only_debug_shows_a_traceback(tmp_path: Path) -> None:
    arguments = ["-m", "refiners.cli", "generate", "a cat", "--model", "none"]
    plain, debug = python(*arguments, cwd=tmp_path), python(*arguments, "--debug", cwd=tmp_path)
    assert plain.returncode == 1 and debug.returncode == 1
    assert plain.stderr.startswith("error: 'none' is no folder") and plain.stderr.count("\n") == 1
    assert "Traceback" in debug.stderr and "FileNotFoundError" in debug.stderr


@pytest.mark.slow
def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom refiners.cli import main\nsys.argv[1:] = ['generate', '--help']\n"
        "try:\n    main()\nfinally:\n    print({'torch', 'numpy', 'tokenizers'} & set(sys.modules), file=sys.stderr)"
    )
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 0 and "--seed" in done.stdout
    assert done.stderr.strip() == "set()"
