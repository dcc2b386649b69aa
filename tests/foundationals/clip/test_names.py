"""The rules of names cover every parameter, at full size, both ways."""

import dataclasses
import functools

import pytest
import torch
from clip_specimens import SMALL, build_small, config_of
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from refiners.foundationals.clip.names import SINGLE_FILE_PREFIX, text_encoder_names
from refiners.foundationals.clip.text_encoder import CLIP_G, CLIP_H, CLIP_H_24, CLIP_L, CLIPTextEncoder, CLIPTextSpec
from refiners.weights.rules import UnknownNameError

SPECS = {
    "L": CLIP_L,
    "H": CLIP_H,
    "H_24": CLIP_H_24,
    "G": CLIP_G,
    "one_layer": dataclasses.replace(CLIP_L, num_layers=1),
}


@functools.cache
def our_shapes(spec: CLIPTextSpec) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in CLIPTextEncoder(spec, device="meta").state_dict().items()}


@pytest.fixture(scope="module", params=SPECS)
def spec(request: pytest.FixtureRequest) -> CLIPTextSpec:
    return SPECS[request.param]


def test_every_tensor_of_transformers_has_its_place(spec: CLIPTextSpec) -> None:
    with torch.device("meta"):
        theirs = CLIPTextModel(config_of(spec)).state_dict()
    ours, names = our_shapes(spec), text_encoder_names(spec, prefix="")
    assert {names.to_ours(name): tensor.shape for name, tensor in theirs.items()} == ours
    assert {names.to_theirs(name) for name in ours} == set(theirs)
    assert all(names.to_theirs(names.to_ours(name)) == name for name in theirs)


@pytest.mark.parametrize("prefix", ["text_model", SINGLE_FILE_PREFIX])
def test_prefixed_names_go_both_ways(spec: CLIPTextSpec, prefix: str) -> None:
    names = text_encoder_names(spec, prefix)
    for name in our_shapes(spec):
        theirs = names.to_theirs(name)
        assert theirs == f"{prefix}.{text_encoder_names(spec, prefix='').to_theirs(name)}"
        assert names.to_ours(theirs) == name


def test_a_model_with_projection_loads_without_it() -> None:
    with torch.device("meta"):
        theirs = CLIPTextModelWithProjection(config_of(SMALL)).state_dict()
    names = text_encoder_names(SMALL)
    ours = {name: names.to_ours(name) for name in theirs}
    assert [name for name, mine in ours.items() if mine is None] == ["text_projection.weight"]
    assert set(build_small().state_dict()) == {mine for mine in ours.values() if mine is not None}


@pytest.mark.parametrize("prefix", ["text_model", SINGLE_FILE_PREFIX])
def test_the_position_ids_of_old_files_are_dropped(prefix: str) -> None:
    assert text_encoder_names(CLIP_L, prefix).to_ours(f"{prefix}.embeddings.position_ids") is None


@pytest.mark.parametrize(
    "name", ["text_model.encoder.layers.0.self_attn.in_proj_weight", "vision_model.x", "logit_scale"]
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UnknownNameError, match="no rule covers"):
        text_encoder_names(CLIP_L).to_ours(name)
