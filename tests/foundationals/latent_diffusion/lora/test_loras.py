"""`model.loras`: LoRAs by name, whole or not at all; scales by block, by picture and by step."""

import copy
import gc
import re
from pathlib import Path
from typing import Any, cast

import numpy
import pytest
import torch
from lora_specimens import kohya_tensors, load_both, random_factors, write
from torch import Tensor

from refiners.adapters.lora import LoraAdapter
from refiners.foundationals.latent_diffusion import StableDiffusion_1
from refiners.foundationals.latent_diffusion.lora import LoraWeights

PROMPTS = ["a red circle on white", "a blue square", "a green star in the top left"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files: of everything, of the UNet with norm differences, and of the text encoder."""
    folder = tmp_path_factory.mktemp("loras")
    _, theirs = load_both()
    wanted = {
        "style": lambda component, name: "attn" in name,
        "detail": lambda component, name: component == "unet" and "ff" in name,
        "words": lambda component, name: component == "text_encoder",
    }
    for index, (stem, choice) in enumerate(wanted.items()):
        tensors = kohya_tensors(random_factors(theirs, choice, rank=2 + index))
        if stem == "detail":
            tensors["lora_unet_conv_norm_out.w_norm"] = 0.3 * torch.randn(theirs.unet.conv_norm_out.weight.shape)
        write(folder / f"{stem}.safetensors", tensors)
    return folder


def picture(sd: StableDiffusion_1, count: int = 1) -> Tensor:
    """What the model makes of noise in one step, text encoder included."""
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).expand(count, -1, -1, -1)
    text = sd.compute_text_embedding(PROMPTS[:1] * count)
    with torch.no_grad():
        return sd.predict_noise(x, 3, text, 2.0)


def error(one: Tensor, other: Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


def test_what_is_added_is_there_by_name_and_goes_without_a_trace(sd: StableDiffusion_1, folder: Path) -> None:
    before, keys = picture(sd), list(sd.state_dict())
    report = sd.loras.add(folder / "style.safetensors", scale=0.8)
    assert report.name == "style" and not report.left_out
    sd.loras.add(folder / "detail.safetensors", name="fine")
    assert list(sd.loras) == ["style", "fine"] and len(sd.loras) == 2 and "fine" in sd.loras
    assert sd.loras.scales == {"style": {0.8}, "fine": {1.0}}
    both = picture(sd)
    sd.loras.remove("style")
    alone = picture(sd)
    sd.loras.clear()
    assert torch.equal(picture(sd), before) and list(sd.state_dict()) == keys and not len(sd.loras)
    assert min(error(both, before), error(alone, before), error(alone, both)) > 1e-3


def test_the_same_as_with_the_file_by_itself(sd: StableDiffusion_1, folder: Path) -> None:
    weights = LoraWeights(folder / "style.safetensors")
    weights.patch(sd, 0.3)
    expected = picture(sd)
    assert list(sd.loras) == ["style"]
    sd.loras.remove("style")
    assert not len(sd.loras)
    sd.loras.add(weights, scale=0.3)
    assert torch.equal(picture(sd), expected)


def test_a_disabled_lora_does_nothing_and_keeps_its_scale(sd: StableDiffusion_1, folder: Path) -> None:
    before = picture(sd)
    sd.loras.add(folder / "style.safetensors", scale=0.7)
    on = picture(sd)
    sd.loras.disable()
    assert error(picture(sd), before) < 1e-6 and sd.loras.scales == {"style": {0.7}}
    sd.loras.enable("style")
    assert torch.equal(picture(sd), on)
    with sd.loras.only():
        assert error(picture(sd), before) < 1e-6
    assert torch.equal(picture(sd), on)


def test_inside_with_a_lora_is_on_the_model(sd: StableDiffusion_1, folder: Path) -> None:
    before = picture(sd)
    with pytest.raises(ZeroDivisionError), sd.loras.applied(folder / "style.safetensors", scale=2.0) as report:
        assert report.name in sd.loras and error(picture(sd), before) > 1e-3
        _ = 1 / 0
    assert not len(sd.loras) and torch.equal(picture(sd), before)


# -- blocks


def test_blocks_say_how_strong_a_lora_is_where(sd: StableDiffusion_1, folder: Path) -> None:
    sd.loras.add(folder / "style.safetensors", scale=0.5, blocks={"unet": 0.0, "unet.down_blocks": 2.0})
    found = {delta.scale for delta in sd.loras["style"]}
    assert found == {0.0, 1.0, 0.5}  # the rest of the UNet, its way down, the text encoder
    for layer, delta in sd.loras._of("style"):
        assert layer is not None
        name = layer.place.dotted_name
        assert delta.scale == (1.0 if "down_blocks" in name else 0.0 if name.startswith("unet") else 0.5)
    sd.loras.set_scale("style", 1.0, blocks={"input_blocks": 0.5, "text_encoder.text_model.encoder.layers.0": 3.0})
    assert sd.loras.scales["style"] == {1.0, 0.5, 3.0}


def test_seventeen_numbers_are_those_of_web_uis(sd: StableDiffusion_1, folder: Path) -> None:
    numbers = [0.1 * (index + 1) for index in range(17)]
    sd.loras.add(folder / "style.safetensors", blocks=numbers)
    for layer, delta in sd.loras._of("style"):
        assert layer is not None
        path = layer.place.names[1] if layer.place.dotted_name.startswith("unet") else "text"
        if path == "text":
            assert delta.scale == numbers[0]
        elif path.startswith("input_blocks.1."):
            assert delta.scale == numbers[1]
        elif path.startswith("middle_block"):
            assert delta.scale == numbers[7]


def test_a_block_that_no_layer_is_in_is_an_error_and_nothing_is_added(sd: StableDiffusion_1, folder: Path) -> None:
    before = picture(sd)
    with pytest.raises(
        ValueError, match=r"no layer of this adapter is in 'unet\.down_block'; did you mean 'unet\.down"
    ):
        sd.loras.add(folder / "style.safetensors", blocks={"unet.down_block": 0.5})
    with pytest.raises(ValueError, match="3 block weights, but there are 17"):
        sd.loras.add(folder / "style.safetensors", blocks=[1, 2, 3])
    assert not len(sd.loras) and torch.equal(picture(sd), before)


@pytest.mark.parametrize(
    ("scale", "blocks", "message"),
    [
        (
            0.2,
            {"text_encoder": float("nan")},
            "weight of block .text_encoder. should be a finite number, not nan",
        ),
        (0.2, {"text_encoder": "0.5"}, "weight of block .text_encoder. should be a finite number, not .0.5."),
        (1e308, {"text_encoder": 1e10}, "must be a finite number, not inf"),
        ("0.5", None, "a scale is a number, or one for each sample of the batch, not '0.5'"),
        (None, None, "a scale is a number, or one for each sample of the batch, not None"),
        ([0.5, "1"], None, r"a scale is a number, or one for each sample of the batch, not \[0.5, '1'\]"),
    ],
)
def test_a_bad_scale_changes_none_of_the_layers(
    sd: StableDiffusion_1, folder: Path, scale: Any, blocks: Any, message: str
) -> None:
    sd.loras.add(folder / "style.safetensors", scale=lambda step, count: 0.7)
    sd.loras.set_scale("style", 0.7, blocks={"text_encoder": 0.5})
    before = picture(sd)
    with pytest.raises((TypeError, ValueError), match=message):
        sd.loras.set_scale("style", scale, blocks)
    assert sd.loras.scales == {"style": {0.7, 0.35}} and torch.equal(picture(sd), before)


def test_numbers_of_numpy_and_torch_are_scales(sd: StableDiffusion_1, folder: Path) -> None:
    sd.loras.add(folder / "style.safetensors", scale=cast(Any, torch.tensor(0.5)))
    assert sd.loras.scales == {"style": {0.5}}
    sd.loras.set_scale("style", cast(Any, numpy.float32(0.25)))
    assert sd.loras.scales == {"style": {0.25}}
    sd.loras.set_scale("style", cast(Any, numpy.array([0.25, 2], dtype=numpy.float16)), blocks={"unet": 2.0})
    assert sd.loras.scales == {"style": {(0.25, 2.0), (0.5, 4.0)}}


# -- pictures and steps


def test_each_picture_of_a_batch_can_have_its_own_scales(sd: StableDiffusion_1, folder: Path) -> None:
    for stem in ("style", "detail", "words"):
        sd.loras.add(folder / f"{stem}.safetensors")
    rows = {"style": (0.0, 1.0, 0.5), "detail": (1.0, 0.0, 0.5), "words": (0.0, 0.0, 2.0)}
    expected: list[Tensor] = []
    for index in range(3):
        for name, scales in rows.items():
            sd.loras.set_scale(name, scales[index])
        expected.append(picture(sd))
    for name, scales in rows.items():
        sd.loras.set_scale(name, scales)
    assert error(picture(sd, count=3), torch.cat(expected)) < 1e-5
    assert error(expected[0], expected[1]) > 1e-3


def test_long_prompts_keep_their_own_scales(sd: StableDiffusion_1, folder: Path) -> None:
    """Their text takes several chunks, which are encoded in one batch."""
    sd.loras.add(folder / "words.safetensors")
    prompts = ["a cat " * 60, "a dog"]
    texts: list[Tensor] = []
    for prompt, scale in zip(prompts, (0.2, 1.5), strict=True):
        sd.loras.set_scale("words", scale)
        texts.append(sd.compute_text_embedding([prompt, prompts[0]])[2:3])
    sd.loras.set_scale("words", (0.2, 1.5))
    assert error(sd.compute_text_embedding(prompts)[2:], torch.cat(texts)) < 1e-5


def test_a_scale_can_be_a_function_of_the_step(sd: StableDiffusion_1, folder: Path) -> None:
    sd.set_num_inference_steps(4)
    text = sd.compute_text_embedding(PROMPTS[:1])
    x = torch.randn(1, 4, 8, 8)
    expected: list[Tensor] = []
    sd.loras.add(folder / "detail.safetensors")
    for step in sd.steps:
        sd.loras.set_scale("detail", step / 4, blocks={"unet.down_blocks": 0.5})
        expected.append(sd.predict_noise(x, step, text))
    sd.loras.set_scale("detail", lambda step, count: step / count, blocks={"unet.down_blocks": 0.5})
    for step in sd.steps:
        assert torch.equal(sd.predict_noise(x, step, text), expected[step])
    sd.loras.remove("detail")
    assert error(sd.predict_noise(x, 0, text), expected[3]) > 1e-4


def test_a_copy_follows_the_same_schedule(sd: StableDiffusion_1, folder: Path) -> None:
    sd.set_num_inference_steps(4)
    sd.loras.add(folder / "style.safetensors", scale=lambda step, count: 0.5 + step / count)
    copies = [sd.structural_copy(), copy.deepcopy(sd)]
    sd.loras.set_scale("style", 2.0)
    text, x = sd.compute_text_embedding(PROMPTS[:1]), torch.randn(1, 4, 8, 8)
    for each in copies:
        for step in each.steps:
            each.predict_noise(x, step, text)
            assert each.loras.scales["style"] == {0.5, 0.5 + step / 4}
        each.loras.remove("style")
    assert sd.loras.scales["style"] == {2.0}


def test_a_text_encoder_keeps_the_scale_of_the_first_step(sd: StableDiffusion_1, folder: Path) -> None:
    sd.set_num_inference_steps(4)
    sd.loras.add(folder / "style.safetensors", scale=0.5)
    expected = sd.compute_text_embedding(PROMPTS[:1])
    sd.loras.set_scale("style", lambda step, count: 0.5 + step / count)
    for _ in range(2):  # the second picture is as the first
        text = sd.compute_text_embedding(PROMPTS[:1])
        assert torch.equal(text, expected)
        for step in sd.steps:
            sd.predict_noise(torch.randn(1, 4, 8, 8), step, text)
            assert sd.loras.scales["style"] == {0.5, 0.5 + step / 4}
    with pytest.raises(TypeError, match="a scale is a number, or one for each sample of the batch, not None"):
        sd.loras.set_scale("style", cast(Any, lambda step, count: None))
    assert sd.loras.scales["style"] == {0.5, 1.25}


# -- merging


def test_merged_loras_are_in_the_weights_and_come_out_again(sd: StableDiffusion_1, folder: Path) -> None:
    base = {name: tensor.clone() for name, tensor in sd.state_dict().items()}
    for stem, scale in (("style", 0.8), ("detail", -0.5), ("words", 1.5)):
        sd.loras.add(folder / f"{stem}.safetensors", scale=scale)
    expected = picture(sd)
    merged = sd.loras.merge()
    assert not len(sd.loras) and list(sd.state_dict()) == list(base)
    assert error(picture(sd), expected) < 1e-5
    merged.unmerge()
    assert list(sd.loras) == ["style", "detail", "words"]
    assert torch.equal(picture(sd), expected)
    sd.loras.clear()
    assert all(torch.equal(tensor, base[name]) for name, tensor in sd.state_dict().items())


def test_a_hundred_times_on_and_off_leaves_the_model_as_it_was(sd: StableDiffusion_1, folder: Path) -> None:
    before, modules = picture(sd), sum(1 for _ in sd.modules())
    weights = LoraWeights(folder / "words.safetensors")
    gc.disable()  # what is taken off is to be freed at once, not when garbage is looked for
    try:
        for count in range(100):
            sd.loras.add(weights)
            assert not gc.isenabled()
            sd.loras.clear()
            if not count:
                objects = len(gc.get_objects())
        assert len(gc.get_objects()) <= objects + 10
    finally:
        gc.enable()
    assert torch.equal(picture(sd), before) and sum(1 for _ in sd.modules()) == modules


# -- mistakes


@pytest.mark.parametrize(
    "call",
    [
        lambda loras: loras.set_scale("stile", 1.0),
        lambda loras: loras.remove("style", "stile"),
        lambda loras: loras.enable("stile"),
        lambda loras: loras.merge("stile"),
        lambda loras: loras["stile"],
    ],
)
def test_an_unknown_name_is_an_error_that_says_what_there_is(sd: StableDiffusion_1, folder: Path, call: Any) -> None:
    sd.loras.add(folder / "style.safetensors")
    before = picture(sd)
    with pytest.raises(KeyError, match="no LoRA 'stile' on this model; there are: style"):
        call(sd.loras)
    assert torch.equal(picture(sd), before)


@pytest.mark.parametrize("name", ["", "style (difference)"])
def test_a_name_can_be_told_from_those_of_differences(sd: StableDiffusion_1, folder: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"a LoRA cannot be called '{re.escape(name)}': give it a name that"):
        sd.loras.add(folder / "style.safetensors", name=name)
    file = (folder / "style.safetensors").rename(folder / "style (difference).safetensors")
    with sd.loras.applied(file) as report:
        assert list(sd.loras) == [report.name] == ["style"]
    file.rename(folder / "style.safetensors")
    assert not len(sd.loras)


def test_a_name_is_taken_once(sd: StableDiffusion_1, folder: Path) -> None:
    sd.loras.add(folder / "style.safetensors", name="a")
    with pytest.raises(ValueError, match="there is a LoRA 'a' on this model already"):
        sd.loras.add(folder / "detail.safetensors", name="a")
    assert list(sd.loras) == ["a"]


def test_what_was_injected_by_hand_is_there_too(sd: StableDiffusion_1) -> None:
    layer = sd.unet.ensure_find(torch.nn.Linear)
    LoraAdapter(layer, name="mine", scale=0.4).inject()  # pyright: ignore[reportArgumentType]
    assert sd.loras.scales == {"mine": {0.4}}
    sd.loras.remove("mine")
    assert not len(sd.loras)
