"""Stable Diffusion XL, its refiner and inpainting, from files and to files: folders, single files, parts, the hub."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders import single_file_utils
from diffusion_specimens import SPECS, small_model
from safetensors.torch import load_file, save_file
from test_hub import cached_repository, hub_that
from test_pretrained import assert_same
from torch import nn
from transformers import CLIPTextModelWithProjection

from refiners.foundationals.latent_diffusion import (
    SDXL,
    SDXL_INPAINTING,
    SDXL_REFINER,
    StableDiffusion,
    StableDiffusion_1,
    StableDiffusion_XL,
    StableDiffusion_XL_Inpainting,
    StableDiffusion_XL_Refiner,
    StableDiffusionSpec,
)
from refiners.foundationals.latent_diffusion.files import parts_folder, single_file
from refiners.foundationals.latent_diffusion.files.convert import FORMS, read_model, write_model
from refiners.foundationals.latent_diffusion.files.diffusers_configs import write_spec
from refiners.foundationals.latent_diffusion.files.diffusers_folder import parts

CLASSES: dict[str, type[StableDiffusion]] = {
    "base": StableDiffusion_XL,
    "inpainting": StableDiffusion_XL_Inpainting,
    "refiner": StableDiffusion_XL_Refiner,
}
PIPELINES: dict[str, Any] = {
    "base": StableDiffusionXLPipeline,
    "inpainting": StableDiffusionXLInpaintPipeline,
    "refiner": StableDiffusionXLImg2ImgPipeline,
}


@pytest.fixture(scope="module", params=CLASSES)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(kind: str) -> Any:
    return small_model(CLASSES[kind])


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "sdxl"
    model.save_pretrained(path)
    return path


def test_a_folder_gives_back_the_model_its_class_and_its_spec(kind: str, model: Any, folder: Path) -> None:
    loaded = StableDiffusion.from_pretrained(folder)
    assert type(loaded) is CLASSES[kind] and loaded.spec == SPECS[CLASSES[kind]]
    assert_same(loaded, model)
    assert_same(StableDiffusion_XL.from_pretrained(folder), model)


def test_diffusers_loads_our_folder_and_we_load_what_it_writes(
    kind: str, model: Any, folder: Path, tmp_path: Path
) -> None:
    pipeline = PIPELINES[kind].from_pretrained(folder, add_watermarker=False)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == PIPELINES[kind].__name__
    assert pipeline.tokenizer_2.pad_token == "!" and (pipeline.tokenizer is None) == (kind == "refiner")
    assert pipeline.config.get("requires_aesthetics_score", False) == (kind == "refiner")
    pipeline.save_pretrained(tmp_path / "theirs")
    loaded = StableDiffusion.from_pretrained(tmp_path / "theirs")
    assert_same(loaded, model)
    assert loaded.spec == model.spec


def test_single_files_and_parts_give_back_the_model(kind: str, model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "one.safetensors")
    assert_same(CLASSES[kind].from_pretrained(tmp_path / "one.safetensors", spec=model.spec), model)
    torch.save({"state_dict": load_file(tmp_path / "one.safetensors")}, tmp_path / "one.ckpt")
    assert_same(StableDiffusion.from_pretrained(tmp_path / "one.ckpt", spec=model.spec), model)
    parts_folder.write(tmp_path / "parts", model.spec, model.state_dict(), None)
    assert_same(StableDiffusion.from_pretrained(tmp_path / "parts", spec=model.spec), model)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_made_of_a_folder(
    kind: str, model: Any, folder: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cls in (CLASSES[kind], StableDiffusion_XL):
        monkeypatch.setattr(cls, "default_spec", SPECS[cls])
    target = tmp_path / ("one.safetensors" if form == "single-file" else "other")
    write_model(read_model(folder), target, form)
    assert_same(StableDiffusion.from_pretrained(target), model)


def test_the_autoencoder_stays_in_float32_where_float16_is_too_narrow(model: Any, folder: Path, tmp_path: Path) -> None:
    half = StableDiffusion.from_pretrained(folder, dtype=torch.float16)
    assert half.unet.dtype == half.clip_text_encoder.dtype == torch.float16 and half.lda.dtype == torch.float32
    with torch.no_grad():
        latents = torch.randn(1, 4, 8, 8)
        assert half.lda.decode(latents.half()).dtype == torch.float32
        assert torch.equal(half.lda.decode(latents), model.lda.decode(latents))
    assert type(half)(dtype=torch.float16, device="meta", spec=model.spec).lda.dtype == torch.float32
    assert StableDiffusion.from_pretrained(folder, dtype=torch.bfloat16).lda.dtype == torch.bfloat16
    fixed = shutil.copytree(folder, tmp_path / "fixed")
    config = json.loads((fixed / "vae/config.json").read_text())
    (fixed / "vae/config.json").write_text(json.dumps(config | {"force_upcast": False}))
    assert StableDiffusion.from_pretrained(fixed, dtype=torch.float16).lda.dtype == torch.float16


def test_a_repository_of_the_hub_is_read_from_the_cache(
    model: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached_repository(folder, tmp_path)
    hub_that(ConnectionError("offline"), monkeypatch, tmp_path)
    assert_same(StableDiffusion_XL.from_pretrained("someone/small"), model)


def test_a_model_of_the_other_family_says_which_class_holds_it(kind: str, model: Any, folder: Path) -> None:
    name = CLASSES[kind].__name__
    with pytest.raises(ValueError, match=f"sdxl: this is no StableDiffusion_1: it is a {name}, so use that"):
        StableDiffusion_1.from_pretrained(folder)
    with pytest.raises(ValueError, match="builtin: this is no StableDiffusion_XL: it is a StableDiffusion_1"):
        StableDiffusion_XL.from_pretrained("builtin")
    if kind != "base":
        with pytest.raises(ValueError, match="this is no StableDiffusion_XL_"):
            (StableDiffusion_XL_Refiner if kind == "inpainting" else StableDiffusion_XL_Inpainting).class_for(
                model.spec
            )


def test_single_files_of_the_other_family_say_which_class_holds_them(tmp_path: Path) -> None:
    small_model(StableDiffusion_1).save_pretrained(tmp_path / "one.safetensors")
    small_model(StableDiffusion_XL).save_pretrained(tmp_path / "xl.safetensors")
    small_model(StableDiffusion_XL_Refiner).save_pretrained(tmp_path / "refiner.safetensors")
    with pytest.raises(ValueError, match="no StableDiffusion_XL: it is a StableDiffusion_1"):
        StableDiffusion_XL.from_pretrained(tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match="no StableDiffusion_1: it is a StableDiffusion_XL"):
        StableDiffusion_1.from_pretrained(tmp_path / "xl.safetensors")
    with pytest.raises(ValueError, match="no StableDiffusion_1: it is a StableDiffusion_XL_Refiner"):
        StableDiffusion_1.from_pretrained(tmp_path / "refiner.safetensors")


def test_a_file_without_text_encoders_is_refused_for_what_it_lacks(tmp_path: Path) -> None:
    small_model(StableDiffusion_XL).save_pretrained(tmp_path / "xl.safetensors")
    tensors = load_file(tmp_path / "xl.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("conditioner.")}
    save_file(kept, tmp_path / "xl.safetensors")
    with pytest.raises(ValueError, match="no whole Stable Diffusion XL, as there is no text encoder in it"):
        StableDiffusion_XL.from_pretrained(tmp_path / "xl.safetensors")


def test_joined_projections_of_a_wrong_shape_are_named(tmp_path: Path) -> None:
    path = tmp_path / "xl.safetensors"
    small_model(StableDiffusion_XL).save_pretrained(path)
    tensors = load_file(path)
    name = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
    assert tensors[name].shape == (96, 32)
    tensors[name] = tensors[name][:60].clone()
    tensors.pop("conditioner.embedders.1.model.text_projection")
    save_file(tensors, path)
    with pytest.raises(ValueError, match=rf"missing \(first: '.*model.text_projection'\), 3 have .*'{name}.0' is"):
        StableDiffusion_XL.from_pretrained(path, spec=SPECS[StableDiffusion_XL])


# -- the full size


FULL = {
    "base": (StableDiffusion_XL, SDXL, 1680 + 248 + 196 + 517),
    "inpainting": (StableDiffusion_XL_Inpainting, SDXL_INPAINTING, 1680 + 248 + 196 + 517),
    "refiner": (StableDiffusion_XL_Refiner, SDXL_REFINER, 1220 + 248 + 517),
}


@pytest.mark.slow
@pytest.mark.parametrize(("cls", "spec", "count"), FULL.values(), ids=FULL)
def test_every_key_of_the_full_size_has_its_place_in_both_forms(
    cls: type[StableDiffusion], spec: StableDiffusionSpec, count: int
) -> None:
    ours = cls(device="meta").state_dict()
    names = single_file.names(spec)
    theirs = {str(names.to_theirs(name)) for name in ours}
    assert {names.to_ours(name) for name in theirs} == set(ours)
    assert len(theirs) == len(ours) == count
    for part, expected in their_parts(spec).items():
        (own,) = (each for each in parts(spec) if each.theirs == part)
        below = {name.removeprefix(f"{own.ours}."): tensor for name, tensor in ours.items() if own.ours in name}
        assert {str(own.names.to_theirs(name)): tensor.shape for name, tensor in below.items()} == expected, part


def their_parts(spec: StableDiffusionSpec) -> dict[str, dict[str, torch.Size]]:
    """The names and shapes of diffusers' and transformers' models from the configuration that we write."""
    configs = {name: json.loads(text) for name, text in write_spec(spec).items() if name.endswith("config.json")}
    with torch.device("meta"):
        models: dict[str, nn.Module] = {
            "unet": UNet2DConditionModel.from_config(configs["unet/config.json"]),
            "vae": AutoencoderKL.from_config(configs["vae/config.json"]),
            "text_encoder_2": CLIPTextModelWithProjection(
                CLIPTextModelWithProjection.config_class(**configs["text_encoder_2/config.json"])
            ),
        }
    return {name: {key: value.shape for key, value in each.state_dict().items()} for name, each in models.items()}


@pytest.mark.slow
@pytest.mark.parametrize("spec", [SDXL, SDXL_REFINER], ids=["base", "refiner"])
def test_diffusers_knows_every_name_of_our_single_file(spec: StableDiffusionSpec, tmp_path: Path) -> None:
    names = single_file.names(spec)
    ours = StableDiffusion.class_for(spec)(device="meta", spec=spec).state_dict()
    tensors = {str(names.to_theirs(name)): tensor for name, tensor in ours.items()}
    original = single_file.rejoined(tensors)
    configs = {name: json.loads(text) for name, text in write_spec(spec).items() if name.endswith("config.json")}
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(configs["unet/config.json"])
        text = CLIPTextModelWithProjection(
            CLIPTextModelWithProjection.config_class(**configs["text_encoder_2/config.json"])
        )
    found = single_file_utils.convert_ldm_unet_checkpoint(dict(original), dict(unet.config))
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in unet.state_dict().items()
    }
    prefix = f"conditioner.embedders.{0 if spec is SDXL_REFINER else 1}.model."
    found = single_file_utils.convert_open_clip_checkpoint(text, dict(original), prefix=prefix)
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in text.state_dict().items()
    }
