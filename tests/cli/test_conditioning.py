"""`refiners generate` with ControlNets, T2I-Adapters and pictures as prompts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_specimens import FAST, fail, pixels, succeed
from diffusion_specimens import SMALL, randomize
from PIL import Image

from refiners.cli import conditioning
from refiners.fluxion.utils import no_grad, tensor_to_image
from refiners.foundationals.latent_diffusion import StableDiffusion_1
from refiners.foundationals.latent_diffusion.control import (
    ConditionEncoder,
    ControlNet,
    ControlNetAdapter,
    ControlNetSpec,
    T2IAdapter,
    T2ISpec,
    save_control_net,
)
from refiners.foundationals.latent_diffusion.image_prompt import ImageProjection, IPAdapter
from refiners.foundationals.scenes.reader import load_image_encoder
from refiners.weights.files import write_safetensors


@pytest.fixture
def model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Options that every run here has; files are written to the current folder, where there are two pictures."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for name in ("edges.png", "depth.png"):
        tensor_to_image(torch.rand(1, 3, 64, 64)).save(name)
    return ["a cat", "--seed", 1, "--model", folder, *FAST]


def write_control_net(path: Path) -> Path:
    torch.manual_seed(1)
    control_net = ControlNet(ControlNetSpec(SMALL.unet, (8, 8, 12, 16)))
    randomize(control_net)
    save_control_net(control_net, path)
    return path


def write_t2i_adapter(path: Path) -> Path:
    torch.manual_seed(2)
    encoder = ConditionEncoder(T2ISpec.for_unet(SMALL.unet))
    randomize(encoder)
    write_safetensors(path, encoder.state_dict())
    return path


def made_by(folder: Path, lead: Any) -> bytes:
    """The pixels that the model makes when `lead` has put something onto it."""
    sd15 = StableDiffusion_1.from_pretrained(folder)
    with no_grad():
        lead(sd15)
    return sd15.generate("a cat", seed=1, num_inference_steps=2, show_progress=False)[0].tobytes()


def test_a_control_is_a_controlnet_with_its_picture_at_its_scale(model: list[Any], folder: Path) -> None:
    write_control_net(Path("canny.safetensors"))
    write_control_net(Path("depth"))
    succeed(
        "generate",
        *model,
        "--control",
        "canny.safetensors:edges.png:0.5",
        "--control",
        "depth:depth.png",
        "--out",
        "a.png",
    )

    def lead(sd15: StableDiffusion_1) -> None:
        first = ControlNetAdapter(sd15, "canny.safetensors", scale=0.5).inject()
        first.set_controlnet_condition(Image.open("edges.png"))
        second = ControlNetAdapter(sd15, "depth").inject()
        second.set_controlnet_condition(Image.open("depth.png"))

    assert pixels(Path("a.png")) == made_by(folder, lead) != made_by(folder, lambda sd15: None)
    with Image.open("a.png") as image:
        content, text = json.loads(image.info["refiners"]), image.info["parameters"]
    assert content["settings"]["controls"] == ["canny.safetensors:edges.png:0.5", "depth:depth.png"]
    assert set(content["files"]) == {"canny.safetensors", "edges.png", "depth", "depth.png"}
    assert 'ControlNet 0: "Model: canny, Weight: 0.5", ControlNet 1: "Model: depth, Weight: 1"' in text


def test_a_control_can_be_a_t2i_adapter(model: list[Any], folder: Path) -> None:
    write_t2i_adapter(Path("sketch.safetensors"))
    succeed("generate", *model, "--control", "sketch.safetensors:edges.png:0.7", "--out", "a.png")

    def lead(sd15: StableDiffusion_1) -> None:
        adapter = T2IAdapter(sd15.unet, weights="sketch.safetensors", scale=0.7).inject()
        adapter.set_condition_features(adapter.compute_condition_features(Image.open("edges.png")))

    assert pixels(Path("a.png")) == made_by(folder, lead) != made_by(folder, lambda sd15: None)


def test_pictures_are_prompts_by_an_ip_adapter(model: list[Any]) -> None:
    sd15 = StableDiffusion_1.from_pretrained("builtin")
    settings: dict[str, Any] = {"seed": 1, "num_inference_steps": 2, "show_progress": False}
    plain = sd15.generate("", **settings)[0].tobytes()
    encoder = load_image_encoder()
    width = encoder(Image.new("RGB", (32, 32))).shape[-1]
    adapter = IPAdapter(sd15, encoder, ImageProjection(width, sd15.unet.spec.text_dim, 4), scale=0.5)
    for parameter in adapter.own_parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    adapter.save("ip.safetensors")
    options = ["", "--seed", 1, *FAST, "--ip-adapter", "ip.safetensors:0.5"]
    succeed("generate", *options, "--image-prompt", "edges.png", "--image-prompt", "depth.png:0.3", "--out", "a.png")
    pictures = [Image.open(name) for name in ("edges.png", "depth.png")]
    with no_grad():
        adapter.inject().set_clip_image_embedding(adapter.compute_clip_image_embedding(pictures, [1, 0.3]))
    assert pixels(Path("a.png")) == sd15.generate("", **settings)[0].tobytes() != plain
    with Image.open("a.png") as image:
        content = json.loads(image.info["refiners"])
    assert content["settings"]["ip_adapter"] == "ip.safetensors:0.5"
    assert content["settings"]["image_prompts"] == ["edges.png", "depth.png:0.3"]
    assert set(content["files"]) == {"ip.safetensors", "edges.png", "depth.png"}
    succeed("generate", "--like", "a.png", "--out", "b.png")
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


@pytest.mark.parametrize("name", ["image_encoder", "clip.safetensors"])
def test_an_image_encoder_is_found_beside_the_ip_adapter_or_by_its_name(
    model: list[Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    loaded: list[Path] = []
    monkeypatch.setattr(conditioning, "IPAdapter", lambda *_, **__: pytest.fail("not to be reached"))
    monkeypatch.setattr(conditioning, "load_clip_image_encoder", lambda path, **_: loaded.append(path) or missing())
    Path("models/image_encoder").mkdir(parents=True)
    for path in ("models/ip.safetensors", "clip.safetensors", "models/image_encoder/model.safetensors"):
        write_safetensors(Path(path), {"x": torch.zeros(1)})
    options = [] if name == "image_encoder" else ["--image-encoder", name]
    line = fail("generate", *model, "--ip-adapter", "models/ip.safetensors", "--image-prompt", "edges.png", *options)
    assert "seen" in line
    assert loaded == [Path("models/image_encoder/model.safetensors" if name == "image_encoder" else name)]


def missing() -> None:
    raise ValueError("seen")


@pytest.mark.slow
def test_like_repeats_a_picture_that_was_led(model: list[Any]) -> None:
    write_control_net(Path("canny.safetensors"))
    succeed("generate", *model, "--control", "canny.safetensors:edges.png:0.5", "--out", "first.png")
    succeed("generate", "--like", "first.png", "--out", "second.png")
    assert Path("first.png").read_bytes() == Path("second.png").read_bytes()
    succeed("generate", "--like", "first.png", "--control", "", "--out", "plain.png")
    succeed("generate", *model, "--out", "other.png")
    assert pixels(Path("plain.png")) == pixels(Path("other.png")) != pixels(Path("first.png"))
    Image.new("RGB", (64, 64)).save("edges.png")
    assert "edges.png: this file is not the one" in fail("generate", "--like", "first.png")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--control", "canny.safetensors"], "should be FILE:PICTURE"),
        (["--control", "canny.safetensors:none.png"], "both files must be there"),
        (["--control", "canny.safetensors:edges.png:nan"], "finite"),
        (["--control", "edges.png:edges.png"], "edges.png"),
        (["--control", "canny.safetensors:canny.safetensors"], "this is no picture in a known format"),
        (
            ["--control", "LORA:edges.png"],
            "--control takes a ControlNet, a Control-LoRA or a T2I-Adapter, but this is LoRA",
        ),
        (["--ip-adapter", "canny.safetensors"], "give --ip-adapter and --image-prompt"),
        (["--image-prompt", "edges.png"], "give --ip-adapter and --image-prompt"),
        (
            ["--ip-adapter", "canny.safetensors", "--image-prompt", "edges.png"],
            "name the file or folder with --image-encoder",
        ),
    ],
)
def test_what_cannot_be_ends_in_one_line(model: list[Any], lora: Path, options: list[str], message: str) -> None:
    write_control_net(Path("canny.safetensors"))
    line = fail("generate", *model, *(option.replace("LORA", str(lora)) for option in options))
    assert message in line
    assert not list(Path().glob("a-cat*"))
