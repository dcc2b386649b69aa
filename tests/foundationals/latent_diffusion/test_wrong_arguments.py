"""What is of a wrong type, or for another model: it is said before anything runs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusion_specimens import SMALL, SMALL_XL, SPECS, small_folder, small_model
from PIL import Image

from refiners.fluxion.utils import save_to_safetensors
from refiners.foundationals.latent_diffusion import (
    SD1,
    StableDiffusion_1,
    StableDiffusion_1_Inpainting,
)
from refiners.foundationals.latent_diffusion.control import (
    ConditionEncoder,
    ControlNet,
    ControlNetAdapter,
    ControlNetSpec,
    T2IAdapter,
    T2ISpec,
)
from refiners.foundationals.latent_diffusion.files.parts_folder import part_files
from refiners.foundationals.latent_diffusion.image_prompt import ImageProjection, IPAdapter
from refiners.foundationals.latent_diffusion.multi_diffusion import MultiDiffusion, Region, RegionalPrompts, upscale
from refiners.foundationals.latent_diffusion.steering import (
    PerturbedAttentionGuidance,
    ReferenceOnlyControlAdapter,
    SelfAttentionGuidance,
)
from refiners.foundationals.preprocessors import InformativeDrawings, canny_edges
from refiners.foundationals.preprocessors.informative_drawings import DrawingSpec
from refiners.solvers import DDIM

PICTURE, MASK = Image.new("RGB", (64, 64), (200, 30, 90)), Image.new("L", (64, 64), 255)
INPAINTING = SPECS[StableDiffusion_1_Inpainting]


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model()


@pytest.fixture(scope="module")
def inpainting() -> Any:
    return small_model(StableDiffusion_1_Inpainting)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": None}, "the prompt should be a text, or a list of texts, but it is None"),
        ({"prompt": ["a", 3]}, "the prompt, number 1 of 2, is the int 3: give a text"),
        ({"prompt": b"a cat"}, "the prompt, number 0 of 5, is the int 97: give a text"),
        ({"negative_prompt": 3}, "the negative prompt should be a text, or a list of texts, but it is the int 3"),
        ({"negative_prompt": [None]}, "the negative prompt, number 0 of 1, is None: give a text"),
        ({"seed": None}, "a seed should be a whole number, but it is None"),
        ({"seed": 1.5}, r"a seed should be a whole number, but it is the float 1\.5"),
        ({"seed": [1, "2"]}, "a seed should be a whole number, but it is the str '2'"),
        ({"num_inference_steps": "3"}, "num_inference_steps should be a whole number, but it is the str '3'"),
        ({"num_inference_steps": 3.0}, r"num_inference_steps should be a whole number, but it is the float 3\.0"),
        ({"condition_scale": "7"}, "condition_scale should be a number, but it is the str '7'"),
        ({"condition_scale": torch.ones(2)}, "condition_scale should be a number, but it is a Tensor"),
        ({"solver": DDIM}, "the solver is the class DDIM: give one, or its name"),
        ({"size": 64}, r"a size is height and width in pixels, such as \(512, 768\), but this is the int 64"),
        ({"size": "64x64"}, "a size is height and width in pixels, .*, but this is the str '64x64'"),
        ({"size": (64, 64, 3)}, r"a size is height and width in pixels, .*, but this is the tuple \(64, 64, 3\)"),
        ({"size": (64.0, 64)}, r"a side of the size should be a whole number, but it is the float 64\.0"),
        ({"init_image": "cat.png"}, r"init_image is the str 'cat\.png': give a PIL image, such as PIL\.Image\.open"),
        ({"init_image": np.zeros((64, 64, 3))}, "init_image is a ndarray: give a PIL image"),
        ({"init_image": PICTURE, "mask": Path("m.png")}, "the mask is a PosixPath: give a PIL image"),
        ({"init_image": PICTURE, "strength": "0.5"}, r"strength should be a number, but it is the str '0\.5'"),
        ({"tile_size": "64"}, "tile_size should be a whole number, but it is the str '64'"),
        ({"on_step": 3}, "on_step is the int 3: give a function that takes a StepReport"),
    ],
)
def test_settings_of_a_wrong_type_are_named(model: Any, settings: dict[str, Any], message: str) -> None:
    solver = model.solver
    with pytest.raises(TypeError, match=message):
        model.generate(**{"prompt": "a cat", "num_inference_steps": 1, "show_progress": False, **settings})
    assert model.solver is solver


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"condition_scale": float("nan")}, "condition_scale should be a finite number, but it is nan"),
        ({"strength": float("nan"), "init_image": PICTURE}, "strength should be a finite number, but it is nan"),
        ({"seed": 2**64}, r"the seed 18446744073709551616 should be from -2\*\*63 to 2\*\*64 - 1"),
        ({"size": ()}, "a size is height and width"),
    ],
)
def test_settings_out_of_range_are_named(model: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        model.generate(**{"prompt": "a cat", "num_inference_steps": 1, "show_progress": False, **settings})


def test_numbers_of_numpy_and_torch_are_numbers(model: Any) -> None:
    plain, other = (
        model.generate("a cat", seed=seed, num_inference_steps=steps, condition_scale=scale, show_progress=False)[0]
        for seed, steps, scale in ((3, 1, 2.0), (np.int64(3), torch.tensor(1), np.float32(2.0)))
    )
    assert plain.tobytes() == other.tobytes()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda model: model.init_latents(64), TypeError, "a size is height and width in pixels"),
        (lambda model: model.init_latents((64, 64), generator=0), TypeError, r"is the int 0: .* torch\.Generator\(\)"),
        (lambda model: model.init_latents((64, 64), generator=[0]), TypeError, "the generator is the int 0"),
        (
            lambda model: model.init_latents((64, 64), noise=torch.randn(2, 4, 4, 4)),
            ValueError,
            r"the noise is \(2, 4, 4, 4\), but latents of this size are \(B, 4, 8, 8\)",
        ),
        (lambda model: model.init_latents((64, 64), noise="noise"), TypeError, "the noise is the str 'noise'"),
        (lambda model: model.init_latents((64, 64), "cat.png"), TypeError, "give a PIL image"),
        (lambda model: model.compute_text_embedding(None), TypeError, "the prompt should be a text"),
        (lambda model: model.compute_text_embedding(["a", 3]), TypeError, "the prompt, number 1 of 2, is the int 3"),
        (lambda model: model.compute_text_embedding("a", 3), TypeError, "the negative prompt should be a text"),
        (lambda model: model.compute_text_embedding([]), ValueError, "there is no prompt to encode"),
        (lambda model: model.set_num_inference_steps("30"), TypeError, "num_inference_steps should be a whole number"),
        (lambda model: take_step(model, "0"), TypeError, "a step of DPMSolver is an int, .* but this is the str '0'"),
        (lambda model: take_step(model, 1.0), TypeError, r"a step of DPMSolver is an int, .* the float 1\.0"),
        (lambda model: take_step(model, 30), IndexError, "DPMSolver has no step 30"),
        (
            lambda model: take_step(model, 0, "a cat"),
            TypeError,
            "clip_text_embedding is the str 'a cat': give a tensor",
        ),
    ],
)
def test_what_steps_are_made_of_is_checked(
    model: Any, call: Callable[[Any], Any], error: type[Exception], message: str
) -> None:
    with torch.no_grad(), pytest.raises(error, match=message):
        call(model)


def take_step(model: Any, step: Any, embedding: Any = None) -> Any:
    embedding = torch.zeros(2, 77, 32) if embedding is None else embedding
    return model(torch.zeros(1, 4, 8, 8), step=step, clip_text_embedding=embedding)


@pytest.mark.parametrize("cls", SPECS)
def test_a_model_without_a_spec_is_of_the_sizes_of_its_parts(cls: Any) -> None:
    model = small_model(cls)
    parts = {"unet": model.unet, "lda": model.lda, "clip_text_encoder": model.clip_text_encoder}
    whole = cls(**parts)
    wanted = replace(model.spec, solver_params=whole.spec.solver_params, default_size=whole.spec.default_size)
    assert replace(whole.spec, vocabulary=wanted.vocabulary, condition_scale=wanted.condition_scale) == wanted
    assert whole.unet is model.unet and whole.clip_text_encoder is model.clip_text_encoder


# -- what leads a model


def control_net(model: Any) -> ControlNetAdapter:
    return ControlNetAdapter(model, ControlNet(ControlNetSpec(model.unet.spec)))


def t2i_adapter(model: Any) -> T2IAdapter:
    return T2IAdapter(model, condition_encoder=ConditionEncoder(T2ISpec.for_unet(model.unet.spec)))


def ip_adapter(model: Any) -> IPAdapter:
    return IPAdapter(model, image_proj=ImageProjection(8, 32))


def see_reference(model: Any, reference: Any) -> None:
    edit = ReferenceOnlyControlAdapter(model).inject()
    try:
        edit.set_controlnet_condition(reference)
        take_step(model, 0)
    finally:
        edit.eject()


A_PICTURE, A_MODEL = "give a PIL image", "give a whole one, not a part of it"
LEADS: list[tuple[Callable[[Any], Any], type[Exception], str]] = [
    (lambda m: ControlNetAdapter(m.lda, ControlNet), TypeError, "the target is a Lat.*: give a UNet, or a model"),
    (lambda m: control_net(m).set_controlnet_condition("a.png"), TypeError, rf"condition is the str.*{A_PICTURE}"),
    (
        lambda m: control_net(m).set_controlnet_condition([PICTURE, None]),
        TypeError,
        "number 1 of 2, is None",
    ),
    (lambda m: control_net(m).set_controlnet_condition([]), ValueError, "the condition should be .* there are none"),
    (lambda m: control_net(m).set_controlnet_condition(torch.zeros(0, 3, 64, 64)), ValueError, r"should be \(B, 3, H"),
    (lambda m: control_net(m).set_controlnet_condition(PICTURE, size=64), TypeError, "a size is height and width"),
    (lambda m: t2i_adapter(m).compute_condition_features(np.zeros((64, 64, 3))), TypeError, A_PICTURE),
    (lambda m: ip_adapter(m).set_masks("m.png"), TypeError, rf"the mask is the str 'm\.png': {A_PICTURE}"),
    (lambda m: ip_adapter(m).set_masks([MASK, MASK], scales=0.5), TypeError, "scales of masks should be 2 numbers"),
    (lambda m: ip_adapter(m).embed_features(torch.zeros(2, 8), weights=[1.0]), ValueError, "weights of pictures.* 2"),
    (lambda m: ip_adapter(m).set_clip_image_embedding(None), TypeError, "the image embedding is None: give what"),
    (lambda m: ip_adapter(m).set_scale("strong"), TypeError, "a scale is a number, or one for each sample"),
    (lambda m: SelfAttentionGuidance(m.unet), TypeError, rf"the model is a UNet: {A_MODEL}"),
    (lambda m: PerturbedAttentionGuidance(m, layers=[]), ValueError, "no patterns of self-attentions"),
    (lambda m: PerturbedAttentionGuidance(m, layers="("), ValueError, r"'\(' is no regular expression"),
    (lambda m: MultiDiffusion(m.unet), TypeError, rf"the model is a UNet: {A_MODEL}"),
    (lambda m: MultiDiffusion(m, stride=0), ValueError, "windows of 64 pixels, each 0 after the one before"),
    (lambda m: MultiDiffusion(m, window_size=64.0), TypeError, "window_size should be a whole number"),
    (lambda m: upscale(m, "a.png"), TypeError, rf"the picture is the str.*{A_PICTURE}"),
    (lambda m: RegionalPrompts(m, [Region("a", (0, 0, 1))]), ValueError, "the mask of a region, .* 4 numbers, .* 3"),
    (lambda m: RegionalPrompts(m, [Region("a", None)]), TypeError, "the mask of a region, .* but it is None"),
    (lambda m: RegionalPrompts(m, [Region("a", (0, 0, 1, "1"))]), TypeError, "number 3 of 4, should be a number"),
    (lambda m: canny_edges("a.png"), TypeError, A_PICTURE),
    (lambda m: InformativeDrawings(DrawingSpec((4, 4, 4))).draw(PICTURE.size), TypeError, A_PICTURE),
    (lambda m: see_reference(m, PICTURE), TypeError, "the reference is a.* give latents"),
    (lambda m: see_reference(m, torch.zeros(1, 3, 8, 8)), ValueError, r"reference is \(1, 3, 8, 8\).* of 4 channels"),
    (
        lambda m: ReferenceOnlyControlAdapter(m).set_reference(m, PICTURE),
        TypeError,
        "the reference is a.* give latents",
    ),
]


@pytest.mark.parametrize(("lead", "error", "message"), LEADS)
def test_what_leads_is_named_if_it_is_of_a_wrong_kind(
    model: Any, lead: Callable[[Any], Any], error: type[Exception], message: str
) -> None:
    with torch.no_grad(), pytest.raises(error, match=message):
        lead(model)


# -- models that fill in, and those that do not


def test_what_is_to_be_filled_in_is_a_picture(inpainting: Any) -> None:
    with pytest.raises(TypeError, match=rf"the picture is the str 'a\.png': {A_PICTURE}"):
        inpainting.set_inpainting_conditions("a.png", MASK)
    with pytest.raises(TypeError, match=rf"the mask is None: {A_PICTURE}"):
        inpainting.set_inpainting_conditions(PICTURE, None)


def test_an_inpainting_model_is_not_made_of_another(model: Any) -> None:
    parts = {"unet": model.unet, "lda": model.lda, "clip_text_encoder": model.clip_text_encoder}
    with pytest.raises(ValueError, match="the unet has in_channels=4, but the spec of the model says 9"):
        StableDiffusion_1_Inpainting(**parts, spec=INPAINTING)
    with pytest.raises(
        ValueError, match="the spec is no StableDiffusion_1_Inpainting's: it is a StableDiffusion_1, so"
    ):
        StableDiffusion_1_Inpainting(**parts, spec=SMALL)
    with pytest.raises(ValueError, match=r"the unet has channels=\(32, 64\), but the spec of the model says \(320,"):
        StableDiffusion_1(**parts, spec=SD1)
    with pytest.raises(ValueError, match="it is a StableDiffusion_1, so use that"):
        StableDiffusion_1_Inpainting(**parts)
    with pytest.raises(ValueError, match="the UNet reads text of width 32, but the text encoder gives 768"):
        StableDiffusion_1(unet=model.unet)
    for spec, name in ((INPAINTING, "StableDiffusion_1_Inpainting"), (SMALL_XL, "StableDiffusion_XL")):
        with pytest.raises(ValueError, match=f"the spec is no StableDiffusion_1's: it is a {name}, so use that"):
            StableDiffusion_1(spec=spec)
    with pytest.raises(TypeError, match="unet is the str 'cpu': give the part itself, or leave it out"):
        StableDiffusion_1("cpu")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("form", ["folder", "single file", "folder of parts"])
def test_an_inpainting_model_is_not_loaded_from_another(form: str, tmp_path: Path) -> None:
    where = saved(StableDiffusion_1, form, tmp_path)
    with pytest.raises(ValueError, match="this is no StableDiffusion_1_Inpainting: it is a StableDiffusion_1, so use"):
        StableDiffusion_1_Inpainting.from_pretrained(where, spec=SMALL if form != "folder" else None)
    with pytest.raises(ValueError, match="have another shape"):
        StableDiffusion_1_Inpainting.from_pretrained(where, spec=INPAINTING)


@pytest.mark.parametrize("form", ["folder", "single file", "folder of parts"])
def test_a_model_that_fills_in_is_loaded_as_one_or_refused(form: str, tmp_path: Path) -> None:
    where = saved(StableDiffusion_1_Inpainting, form, tmp_path)
    spec = INPAINTING if form != "folder" else None
    assert type(StableDiffusion_1.from_pretrained(where, spec=spec)) is StableDiffusion_1_Inpainting
    with pytest.raises(ValueError, match="have another shape"):
        StableDiffusion_1.from_pretrained(where, spec=SMALL)


def saved(cls: type[Any], form: str, tmp_path: Path) -> Path:
    if form == "folder":
        return small_folder(tmp_path / "sd", cls)
    model = small_model(cls)
    if form == "single file":
        model.save_pretrained(tmp_path / "sd.safetensors")
        return tmp_path / "sd.safetensors"
    for part, name in part_files(["text_encoder"]).items():
        save_to_safetensors(tmp_path / name, getattr(model, part).state_dict())
    return tmp_path


def test_the_embedded_model_does_not_fill_in() -> None:
    with pytest.raises(ValueError, match="builtin: this is no StableDiffusion_1_Inpainting"):
        StableDiffusion_1_Inpainting.from_pretrained("builtin")


def test_filling_in_takes_a_mask_each_time(inpainting: Any) -> None:
    settings: dict[str, Any] = {"num_inference_steps": 1, "show_progress": False}
    inpainting.generate("a cat", init_image=PICTURE, mask=MASK, **settings)
    with pytest.raises(ValueError, match="StableDiffusion_1_Inpainting fills in a part of a picture: give init_image"):
        inpainting.generate("a cat", **settings)
    with pytest.raises(ValueError, match="give init_image, and a mask that is white where to fill in"):
        inpainting.generate("a cat", init_image=PICTURE, **settings)
    with torch.no_grad(), pytest.raises(ValueError, match="call set_inpainting_conditions first"):
        take_step(inpainting, 0)


def test_conditions_that_were_set_outlive_a_picture_of_others(inpainting: Any) -> None:
    half = MASK.copy()
    half.paste(0, (0, 0, 32, 64))
    with torch.no_grad():
        inpainting.set_inpainting_conditions(PICTURE, half)
        before = take_step(inpainting, 0)
        inpainting.generate("a cat", init_image=PICTURE, mask=MASK, num_inference_steps=1, show_progress=False)
        assert torch.equal(take_step(inpainting, 0), before)
    inpainting._conditions = None
