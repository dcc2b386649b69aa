"""Keys of LoRA files: how they are taken apart, found in a model's places, given an alpha, and written."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from refiners.weights.lora_keys import (
    CLIP_TEXT_ENCODER,
    UNET,
    Kind,
    LoraUpdate,
    Place,
    Places,
    check_finite,
    check_format,
    fit_parts,
    format_updates,
    parse_settings,
    parse_updates,
    split_key,
)

LINEAR = Place(UNET, "unet.A", "linear", (6, 4), ("mid_block.attentions.0.to_q", "middle_block.1.to_q"))
CONVOLUTION = Place(UNET, "unet.B", "convolution", (6, 4, 3, 3), ("down_blocks.0.conv", "input_blocks.3.0.op"))
NORM = Place(UNET, "unet.C", "norm", (4,), ("conv_norm_out", "out.0"))
TEXT = Place(
    CLIP_TEXT_ENCODER, "clip_text_encoder.D", "linear", (5, 5), ("text_model.layers.0.q_proj", "layers.0.q_proj")
)
PLACES = Places([LINEAR, CONVOLUTION, NORM, TEXT])


@pytest.mark.parametrize(
    ("part", "kind", "name"),
    [
        ("lora_down.weight", Kind.LORA, "down"),
        ("lora_up.weight", Kind.LORA, "up"),
        ("lora_mid.weight", Kind.LORA, "mid"),
        ("lora_A.weight", Kind.LORA, "down"),
        ("lora_B.some_adapter.weight", Kind.LORA, "up"),
        ("lora.down.weight", Kind.LORA, "down"),
        ("lora_linear_layer.up.weight", Kind.LORA, "up"),
        ("alpha", None, "alpha"),
        ("lora_linear_layer.alpha", None, "alpha"),
        ("dora_scale", Kind.DORA, "magnitude"),
        ("lora_magnitude_vector.default.weight", Kind.DORA, "magnitude"),
        ("hada_w1_a", Kind.LOHA, "w1_a"),
        ("hada_w2_b.default", Kind.LOHA, "w2_b"),
        ("lokr_w2", Kind.LOKR, "w2"),
        ("diff_b", Kind.DIFFERENCE, "bias"),
        ("w_norm", Kind.NORM, "weight"),
        ("ia3_l", Kind.IA3, "l"),
        ("oft_R.default.weight", Kind.OFT, "blocks"),
        ("boft_R.default", Kind.BOFT, "R"),
        ("b2.weight", Kind.GLORA, "b2"),
        ("glora_A.default.Xd", Kind.ELEMENTWISE_GLORA, "A_Xd"),
        ("glora_C.zeros", Kind.ELEMENTWISE_GLORA, "C_zeros"),
        ("lora_embedding_A.default", Kind.EMBEDDING, "down"),
        ("lora_B.bias", Kind.BIAS, "bias"),
        ("modules_to_save.default.weight", Kind.WHOLE, "weight"),
        ("weight", Kind.WHOLE, "weight"),
    ],
)
def test_a_key_is_a_layer_and_a_part(part: str, kind: Kind | None, name: str) -> None:
    for layer in ("lora_unet_conv_in", "base_model.model.a.0.b"):
        assert split_key(f"{layer}.{part}") == (layer, kind, name)


def test_attention_processors_have_parts_without_a_mark() -> None:
    assert split_key("a.processor.to_q_lora.down.weight") == ("a.processor.to_q_lora", Kind.LORA, "down")
    assert split_key("a.mlp.down.weight") == ("a.mlp.down", Kind.WHOLE, "weight")


@given(st.text(max_size=60))
def test_any_text_can_be_asked_for(text: str) -> None:
    found = split_key(text)
    assert found is None or text.startswith(f"{found.layer}.")
    assert PLACES.find(text) is None or text in SPELLINGS
    assert PLACES.nearest(text) is None or isinstance(PLACES.nearest(text), str)


SPELLINGS = {
    "unet.mid_block.attentions.0.to_q": LINEAR,
    "mid_block.attentions.0.to_q": LINEAR,
    "lora_unet_mid_block_attentions_0_to_q": LINEAR,
    "lora_unet_middle_block_1_to_q": LINEAR,
    "oft_unet_middle_block_1_to_q": LINEAR,
    "diffusion_model.middle_block.1.to_q": LINEAR,
    "base_model.model.mid_block.attentions.0.to_q": LINEAR,
    "unet.base_model.model.mid_block.attentions.0.to_q": LINEAR,
    "base_model.model.unet.mid_block.attentions.0.to_q": LINEAR,
    "mid_block.attentions.0.processor.to_q_lora": LINEAR,
    "lora_unet.input_blocks.3.0.op": CONVOLUTION,
    "lora_te_text_model_layers_0_q_proj": TEXT,
    "lora_te1_text_model_layers_0_q_proj": TEXT,
    "text_encoder.layers.0.q_proj": TEXT,
    "text_encoder.text_model.layers.0.to_q_lora": TEXT,
    "base_model.model.text_model.layers.0.q_proj": TEXT,
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_finds_its_place(name: str) -> None:
    assert PLACES.find(name) is SPELLINGS[name]


@pytest.mark.parametrize("name", ["", "unet.", "mid_block.attentions.0", "lora_te2_text_model_layers_0_q_proj"])
def test_other_names_find_none(name: str) -> None:
    assert PLACES.find(name) is None


def test_the_nearest_name_keeps_prefix_and_numbers() -> None:
    assert PLACES.nearest("lora_unet_mid_blok_attentions_0_to_q") == "lora_unet_mid_block_attentions_0_to_q"
    assert PLACES.nearest("unet.mid_block.attentions.9.to_q") == "unet.mid_block.attentions.0.to_q"
    assert PLACES.nearest("lora_unet_" + "x" * 1000) is None


def update(place: Place, kind: Kind = Kind.LORA, alpha: float = 1.5, **tensors: Tensor) -> LoraUpdate:
    return LoraUpdate(place, place.path, kind, tensors, alpha, tensors["down"].shape[0])


def factors(place: Place, rank: int = 2) -> dict[str, Tensor]:
    out, *inner = place.shape
    return {"down": torch.randn(rank, *inner), "up": torch.randn(out, rank, *[1] * (len(inner) - 1))}


# -- alphas


def test_alpha_is_that_of_the_key_then_of_the_settings_then_the_rank() -> None:
    tensors = {f"unet.{LINEAR.names[0]}.lora_{letter}.weight": torch.ones(2, 2) for letter in "AB"}
    settings = parse_settings("here", '{"unet.lora_alpha": 8, "text_encoder.lora_alpha": 3}')
    for given_tensors, given_settings, expected in (
        (tensors | {f"unet.{LINEAR.names[0]}.alpha": torch.tensor(0.5)}, settings, 0.5),
        (tensors, settings, 8.0),
        (tensors, {}, 2.0),
    ):
        (found,) = parse_updates(given_tensors, given_settings, PLACES).updates
        assert (found.place, found.alpha, found.rank) == (LINEAR, expected, 2)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("^a.b", 7), ("a.b", 7), ("b", 7), ("^b", 1), ("c", 1), ("xb", 1), (r"a\.b", 7), ("b$", 7)],
)
def test_patterns_are_ends_of_names_or_whole_names(pattern: str, expected: float) -> None:
    settings = parse_settings("here", f'{{"lora_alpha": 1, "alpha_pattern": {{"{pattern}": 7}}}}'.replace("\\", "\\\\"))
    assert settings[""].alpha_of("a.b", rank=4) == expected


def test_of_several_patterns_the_first_counts() -> None:
    settings = parse_settings("here", '{"lora_alpha": 1, "alpha_pattern": {"c": 2, "b": 3, "a.b": 4}}')
    assert settings[""].alpha_of("a.b", rank=4) == 3


def test_rank_stabilised_alpha_is_worth_its_root_of_the_rank() -> None:
    settings = parse_settings("here", '{"lora_alpha": 3, "use_rslora": true}')
    assert settings[""].alpha_of("a", rank=4) / 4 == pytest.approx(3 / math.sqrt(4))


# -- factors


@pytest.mark.parametrize("place", [LINEAR, CONVOLUTION, TEXT])
def test_factors_that_fit_are_not_copied(place: Place) -> None:
    given_factors = factors(place)
    fitted = fit_parts(update(place, **given_factors))
    assert fitted.keys() == given_factors.keys()
    assert all(fitted[part] is given_factors[part] for part in fitted)


def test_flat_kernels_are_unfolded() -> None:
    given_factors = factors(CONVOLUTION)
    flat = {part: tensor.flatten(1) for part, tensor in given_factors.items()}
    fitted = fit_parts(update(CONVOLUTION, **flat))
    assert all(torch.equal(fitted[part], given_factors[part]) for part in given_factors)


@pytest.mark.parametrize(
    ("place", "changes", "message"),
    [
        (NORM, {}, "the layer is a norm, and a LoRA can only be added to"),
        (CONVOLUTION, {"mid": torch.ones(2, 2, 5, 5)}, "do not fit the convolution"),
        (CONVOLUTION, {"mid": torch.ones(3)}, "do not fit the convolution"),
        (CONVOLUTION, {"up": torch.ones(6, 2, 3, 3)}, "do not fit the convolution"),
        (LINEAR, {"up": torch.ones(7, 2)}, "do not fit the linear"),
        (LINEAR, {"up": torch.ones(6, 2, dtype=torch.bool)}, "its up is torch.bool"),
    ],
)
def test_factors_that_do_not_fit(place: Place, changes: dict[str, Tensor], message: str) -> None:
    given_factors = {"down": torch.ones(2, 4), "up": torch.ones(6, 2)} if place is NORM else factors(place)
    with pytest.raises(ValueError, match=message):
        fit_parts(update(place, **(given_factors | changes)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_only_what_is_not_finite_is_refused(dtype: torch.dtype) -> None:
    large = torch.full((3000,), torch.finfo(dtype).max).to(dtype)  # their sum is infinite for some
    check_finite(iter([("a", large), ("b", torch.zeros(3, device="meta"))]))
    broken = large.clone()
    broken[7] = float("nan")
    with pytest.raises(ValueError, match=r"^b has values that are NaN"):
        check_finite(iter([("a", large), ("b", broken)]))


# -- writing


@pytest.mark.parametrize("form", ["kohya", "diffusers", "peft"])
@given(alphas=st.lists(st.floats(-8, 8, width=32), min_size=3, max_size=3), ranks=st.tuples(*[st.integers(1, 4)] * 3))
def test_what_is_written_is_read_as_the_same(form: Any, alphas: list[float], ranks: tuple[int, ...]) -> None:
    updates = [
        update(place, alpha=alpha, **factors(place, rank))
        for place, alpha, rank in zip((LINEAR, CONVOLUTION, TEXT), alphas, ranks, strict=True)
    ]
    tensors, metadata = format_updates(updates, form)
    text = metadata.get("lora_adapter_metadata")
    contents = parse_updates(tensors, parse_settings("here", text) if text else {}, PLACES)
    assert not contents.left_out and len(contents.updates) == 3
    for before, after in zip(updates, contents.updates, strict=True):
        assert (before.place, before.alpha, before.rank) == (after.place, after.alpha, after.rank)
        assert all(torch.equal(before.tensors[part], after.tensors[part]) for part in ("down", "up"))


def test_only_known_formats_are_written() -> None:
    assert check_format("peft") == "peft"
    with pytest.raises(ValueError, match="no LoRA format 'ggml'"):
        check_format("ggml")
