"""LoRA files on Stable Diffusion XL: written by diffusers and by peft, in kohya's, ComfyUI's and OneTrainer's names."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.training_utils import _collate_lora_metadata
from diffusion_specimens import small_folder, small_model
from lora_specimens import write
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from refiners.foundationals.latent_diffusion import SDXL, StableDiffusion_1, StableDiffusion_XL
from refiners.foundationals.latent_diffusion.lora import (
    LoraWeights,
    compare_loras,
    convert_lora,
    export_lora,
    inspect_lora,
    save_lora,
)
from refiners.foundationals.latent_diffusion.lora.places import find_layers

TARGETS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1"],
    "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "text_encoder_2": ["q_proj", "out_proj", "fc1", "fc2"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_folder(tmp_path_factory.mktemp("model") / "sdxl", StableDiffusion_XL)


@pytest.fixture(scope="module")
def adapted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """diffusers' pipeline with random LoRAs on its three trees, and the file that it writes of them."""
    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    torch.manual_seed(1)
    parts = {name: getattr(pipeline, name) for name in TARGETS}
    for name, part in parts.items():
        part.add_adapter(LoraConfig(r=3, lora_alpha=2, target_modules=TARGETS[name], init_lora_weights=False))
        for key, parameter in part.named_parameters():
            if "lora_" in key:
                parameter.data.mul_(0.5)
    path = tmp_path_factory.mktemp("lora")
    layers = {f"{name}_lora_layers": get_peft_model_state_dict(part) for name, part in parts.items()}
    pipeline.save_lora_weights(path, **layers, **_collate_lora_metadata(parts))
    return SimpleNamespace(pipeline=pipeline, file=path / "pytorch_lora_weights.safetensors")


@torch.no_grad()
def ours(model: StableDiffusion_XL) -> list[Tensor]:
    """What the UNet, and both text encoders, make of fixed inputs."""
    generator = torch.Generator().manual_seed(0)
    embedding, pooled = model.compute_text_embedding("a cat")
    x = torch.randn(1, 4, 8, 8, generator=generator)
    text, whole = torch.randn(2, 77, 56, generator=generator), torch.randn(2, 20, generator=generator)
    model.unet.set_timestep(torch.tensor([5, 700]))
    model.unet.set_conditions(
        {"clip_text_embedding": text, "pooled_text_embedding": whole, "time_ids": model.default_time_ids}
    )
    return [model.unet(x.expand(2, -1, -1, -1)), embedding, pooled]


@torch.no_grad()
def theirs(pipeline: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    embedding, negative, pooled, negative_pooled = pipeline.encode_prompt("a cat", negative_prompt="")
    x = torch.randn(1, 4, 8, 8, generator=generator)
    text, whole = torch.randn(2, 77, 56, generator=generator), torch.randn(2, 20, generator=generator)
    time_ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
    added = {"text_embeds": whole, "time_ids": time_ids}
    predicted = pipeline.unet(x.expand(2, -1, -1, -1), torch.tensor([5, 700]), text, added_cond_kwargs=added).sample
    return [predicted, torch.cat([negative, embedding]), torch.cat([negative_pooled, pooled])]


def assert_close(mine: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(mine, expected, strict=True):
        assert ((one - other).norm() / other.norm()).item() <= 1e-4


def test_a_file_of_diffusers_does_what_it_does_there(folder: Path, adapted: SimpleNamespace) -> None:
    model = StableDiffusion_XL.from_pretrained(folder)
    before = ours(model)
    lora = LoraWeights(adapted.file)
    report = lora.patch(model)
    assert {attached.strength for attached in report.attached} == {2 / 3} and not report.left_out
    changed = ours(model)
    assert all(((new - old).norm() / old.norm()).item() > 1e-2 for new, old in zip(changed, before, strict=True))
    assert_close(changed, theirs(adapted.pipeline))
    lora.eject()
    assert all(map(torch.equal, ours(model), before))


@pytest.mark.parametrize("form", ["kohya", "diffusers", "peft"])
def test_every_form_is_written_and_read_again_bit_by_bit(adapted: SimpleNamespace, tmp_path: Path, form: str) -> None:
    model = small_model(StableDiffusion_XL)
    target = tmp_path / ("folder" if form == "peft" else "other.safetensors")
    count = convert_lora(adapted.file, target, model, format=form)
    comparison = compare_loras(adapted.file, target, model)
    assert comparison.equal_count == count == len(comparison.layers)
    if form == "kohya":
        keys = load_file(target).keys()
        starts = {"lora_unet_", "lora_te1_", "lora_te2_"}
        assert {next(start for start in starts if key.startswith(start)) for key in keys} == starts
        assert "lora_unet_input_blocks_4_1_proj_in.lora_down.weight" in keys  # as sd-scripts writes those of XL
    if form == "peft":
        assert {path.name for path in target.iterdir()} == {"unet", "text_encoder", "text_encoder_2"}


def test_diffusers_reads_the_kohya_file_that_we_write(folder: Path, adapted: SimpleNamespace, tmp_path: Path) -> None:
    convert_lora(adapted.file, tmp_path / "kohya.safetensors", small_model(StableDiffusion_XL), format="kohya")
    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipeline.load_lora_weights(tmp_path / "kohya.safetensors")
    assert_close(theirs(pipeline), theirs(adapted.pipeline))


PREFIXES = {
    "ComfyUI": ("diffusion_model.", "text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer."),
    "OneTrainer": ("lora_unet.", "lora_te1.", "lora_te2."),
    "diffusers": ("unet.", "text_encoder.", "text_encoder_2."),
}


@pytest.mark.parametrize("form", PREFIXES)
def test_names_of_all_layers_of_the_full_size_are_found(form: str) -> None:
    layers = find_layers(StableDiffusion_XL(device="meta"))
    places = layers.places
    counts = {"unet": 0, "clip_text_encoder": 0, "clip_text_encoder_2": 0}
    kinds = dict(zip(counts, PREFIXES[form], strict=True))
    linears = [place for place in places.all if place.layer == "linear"]
    for place in linears:
        counts[place.component.name] += 1
        assert places.find(kinds[place.component.name] + place.names[0]) is place
        assert places.find(place.flat_name) is place  # kohya's
        if place.component.name == "unet":
            assert places.find(f"{kinds['unet']}{place.names[1]}") is place
            assert places.find(f"lora_unet_{place.names[0].replace('.', '_')}") is place
    assert counts == {"unet": 743, "clip_text_encoder": 72, "clip_text_encoder_2": 193}
    assert SDXL.text_encoder_paths["text_encoder_2"] in next(path for path in layers if "CLIPTextEncoder_2" in path)


def test_files_of_the_other_family_are_refused_by_name(tmp_path: Path) -> None:
    attention = "down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    for width, cls, file, reads in ((768, StableDiffusion_XL, 1, "XL"), (2048, StableDiffusion_1, "XL", 1)):
        tensors = {
            f"lora_unet_{attention}.lora_down.weight": torch.zeros(2, width),
            f"lora_unet_{attention}.lora_up.weight": torch.zeros(640, 2),
        }
        path = write(tmp_path / f"{width}.safetensors", tensors)
        with pytest.raises(ValueError, match=rf"LoRA of Stable Diffusion {file}.*as Stable Diffusion {reads}: get a"):
            LoraWeights(path).patch(cls(device="meta"))
    only_text = write(
        tmp_path / "text.safetensors",
        {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 24)},
    )
    with pytest.raises(ValueError, match="cannot be used here"):
        LoraWeights(only_text).patch(small_model(StableDiffusion_XL))


def test_loras_by_name_slot_and_blocks(adapted: SimpleNamespace) -> None:
    model = small_model(StableDiffusion_XL)
    before = ours(model)
    model.loras.add(adapted.file, name="style", blocks={"text_encoder_2": 0, "unet.mid_block": 0.5})
    assert model.loras.scales == {"style": {0.0, 0.5, 1.0}}
    model.loras.set_scale("style", 1.0, blocks=[0.5, *[0.25] * 4, 0.5, *[0.75] * 6])
    by_block = {delta.scale for delta in model.loras["style"]}
    assert by_block >= {0.5, 0.75}
    with pytest.raises(ValueError, match="17 block weights, but there are 12"):
        model.loras.set_scale("style", 1.0, blocks=[1.0] * 17)
    model.loras.set_scale("style", 1.0)
    expected = ours(model)
    model.loras.clear()
    assert all(map(torch.equal, ours(model), before))
    slot = model.loras.reserve(rank=4)
    slot.load(adapted.file)
    assert_close(ours(model), expected)
    model.loras.clear()
    assert all(map(torch.equal, ours(model), before))


def test_what_was_loaded_is_exported_and_inspected(adapted: SimpleNamespace, tmp_path: Path) -> None:
    model = small_model(StableDiffusion_XL)
    LoraWeights(adapted.file, name="style").patch(model)
    save_lora(tmp_path / "again.safetensors", model, name="style", format="diffusers")
    assert compare_loras(adapted.file, tmp_path / "again.safetensors", model).error == 0
    tensors, _ = export_lora(model, "style")
    found = inspect_lora(write(tmp_path / "kohya.safetensors", tensors), model)
    assert found.identity.family == "Stable Diffusion XL" and found.report is not None and not found.report.left_out
    layers = [layer for layer in find_layers(model).values() if isinstance(layer.module, nn.Linear)]
    assert len({layer.place.flat_name for layer in layers}) == len(layers)
