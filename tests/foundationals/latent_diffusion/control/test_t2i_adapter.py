"""T2I-Adapter against diffusers' `T2IAdapter`, `UNet2DConditionModel` and pipeline, at random weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import T2IAdapter as TheirAdapter
from torch import Tensor, nn

from refiners.foundationals.latent_diffusion import UNetSpec
from refiners.foundationals.latent_diffusion.control.t2i_adapter_encoder import (
    SD1_T2I,
    SD1_T2I_LIGHT,
    SDXL_T2I,
    ConditionEncoder,
    T2ISpec,
)
from refiners.foundationals.latent_diffusion.control.t2i_adapter_names import (
    authors_names,
    diffusers_names,
    load_condition_encoder,
)
from refiners.foundationals.latent_diffusion.unet_spec import SD1_UNET, SDXL_UNET
from refiners.weights.files import write_safetensors

SD1_LIKE = UNetSpec((32, 64, 64), (1, 1, 0), (2, 4, 8), text_dim=16, norm_groups=8)
XL_LIKE = UNetSpec((32, 64, 64), (0, 1, 2), (2, 4, 8), text_dim=16, norm_groups=8, has_linear_projection=True)
SMALL = {
    "full": T2ISpec.for_unet(SD1_LIKE, 4),
    "full, grey": replace(T2ISpec.for_unet(SD1_LIKE, 4, in_channels=1), blocks_per_level=1),
    "light": replace(T2ISpec.for_unet(SD1_LIKE, 4), blocks_per_level=3, narrowing=4),
    "XL": T2ISpec.for_unet(XL_LIKE, 4),
}


def reference(spec: T2ISpec) -> Any:
    kind = "light_adapter" if spec.is_light else "full_adapter_xl" if spec.halvings[1] == 1 else "full_adapter"
    channels = list(spec.channels[:-1] if spec.is_light else spec.channels)
    return TheirAdapter(spec.in_channels, channels, spec.blocks_per_level, spec.unshuffle_factor, kind)


def randomize(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.9 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.3)


def pair(spec: T2ISpec) -> tuple[ConditionEncoder, Any]:
    torch.manual_seed(0)
    theirs, ours, names = reference(spec), ConditionEncoder(spec), diffusers_names(spec)
    randomize(theirs)
    ours.load_state_dict({str(names.to_ours(key)): tensor for key, tensor in theirs.state_dict().items()})
    return ours, theirs


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("spec", SMALL.values(), ids=SMALL)
def test_features_and_gradients_equal_diffusers(spec: T2ISpec) -> None:
    ours, theirs = pair(spec)
    picture = torch.rand(2, spec.in_channels, 9 * spec.unshuffle_factor, 11 * spec.unshuffle_factor)
    features, expected = ours(picture), theirs(picture)
    assert len(features) == len(expected) == len(spec.channels)
    for feature, other in zip(features, expected, strict=True):
        assert relative_error(feature, other) < 1e-6
    for outputs in (features, expected):
        sum(feature.square().mean() for feature in outputs).backward()  # pyright: ignore
    gradients, names = dict(ours.named_parameters()), diffusers_names(spec)
    for key, parameter in theirs.named_parameters():
        assert relative_error(gradients[str(names.to_ours(key))].grad, parameter.grad) < 1e-5, key


def test_specs_follow_from_those_of_the_unets() -> None:
    assert T2ISpec.for_unet(SD1_UNET) == SD1_T2I
    assert T2ISpec.for_unet(SDXL_UNET) == SDXL_T2I
    assert SDXL_T2I.patch_sides == (16, 16, 32, 32)


@pytest.mark.parametrize("spec", [SD1_T2I, SD1_T2I_LIGHT, SDXL_T2I, replace(SD1_T2I, in_channels=1)])
def test_every_key_of_the_full_size_has_its_place_in_both_formats(spec: T2ISpec) -> None:
    with torch.device("meta"):
        theirs = reference(spec).state_dict()
    ours, authors = ConditionEncoder(spec, device="meta").state_dict(), authors_names(spec)
    assert {diffusers_names(spec).to_theirs(key) for key in ours} == set(theirs)
    for key, tensor in ours.items():
        assert theirs[str(diffusers_names(spec).to_theirs(key))].shape == tensor.shape
        for names in (diffusers_names(spec), authors):
            assert names.to_ours(str(names.to_theirs(key))) == key
    assert len({authors.to_theirs(key) for key in ours}) == len(ours)


@pytest.mark.parametrize("form", ["diffusers", "authors", "ours"])
@pytest.mark.parametrize("kind", [SD1_T2I, replace(SD1_T2I_LIGHT, in_channels=1), SDXL_T2I], ids=["SD1", "light", "XL"])
def test_files_of_all_forms_load_with_the_spec_that_they_have(form: str, kind: T2ISpec, tmp_path: Path) -> None:
    spec = replace(kind, channels=(8, 8, 16, 16))  # a published spec but for its widths
    ours, theirs = pair(spec)
    tensors = ours.state_dict()
    if form != "ours":
        names = diffusers_names(spec) if form == "diffusers" else authors_names(spec)
        tensors = {str(names.to_theirs(key)): tensor for key, tensor in tensors.items()}
    if form == "authors":
        torch.save(tensors, path := tmp_path / "t2iadapter.pth")
    else:
        write_safetensors(path := tmp_path / "diffusion_pytorch_model.safetensors", tensors)
    loaded = load_condition_encoder(tmp_path if form == "diffusers" else path)
    assert loaded.spec == spec
    picture = torch.rand(1, spec.in_channels, 64, 64)
    assert all(torch.allclose(one, two, atol=1e-6) for one, two in zip(loaded(picture), theirs(picture), strict=True))


def test_a_file_of_something_else_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none of the published T2I-Adapters"):
        load_condition_encoder({"conv_in.weight": torch.zeros(4, 7, 3, 3)})
    tensors = pair(SMALL["full"])[1].state_dict()
    with pytest.raises(ValueError, match=r"tensors.*have no place \(first: 'adapter.extra'"):
        load_condition_encoder({**tensors, "adapter.extra": torch.zeros(1)}, SMALL["full"])
