"""The two text encoders of Stable Diffusion XL against transformers', and prompts for both."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_specimens import SMALL, config_of, randomize, relative_error
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection
from transformers import CLIPTokenizer as TransformersTokenizer

from refiners.adapters.lora import LoraAdapter
from refiners.foundationals.clip import (
    CLIPTextEncoder,
    CLIPTextSpec,
    ConceptExtender,
    DoubleTextEncoder,
    encode_pooled_prompt,
    encode_prompt,
)
from refiners.foundationals.clip.names import text_encoder_names

POOLED = dataclasses.replace(SMALL, skipped_layers=1, projection_dim=24)
SPECS = {
    "SDXL": POOLED,
    "two layers skipped": dataclasses.replace(POOLED, skipped_layers=2),
    "one layer left": dataclasses.replace(POOLED, num_layers=2),
}
FIRST = dataclasses.replace(SMALL, embedding_dim=16, skipped_layers=1, use_quick_gelu=True, pad_token_id=None)


def pair(spec: CLIPTextSpec, seed: int = 0) -> tuple[CLIPTextEncoder, Any]:
    """Our encoder and transformers' with a projection, at the same random weights; ours by the names of files."""
    config = config_of(spec)
    config.projection_dim = spec.projection_dim or 8
    theirs = CLIPTextModelWithProjection(config).eval()
    randomize(theirs, seed)
    names, ours = text_encoder_names(spec), CLIPTextEncoder(spec)
    renamed = {names.to_ours(name): tensor.clone() for name, tensor in theirs.state_dict().items()}
    ours.load_state_dict({name: tensor for name, tensor in renamed.items() if name is not None})
    return ours, theirs


def double() -> tuple[DoubleTextEncoder, Any, Any]:
    (first, first_theirs), (second, second_theirs) = pair(FIRST), pair(POOLED, seed=1)
    return DoubleTextEncoder(first, second), first_theirs, second_theirs


def ids_of(spec: CLIPTextSpec, length: int = 13) -> Tensor:
    ids = torch.randint(spec.vocabulary_size - 2, (3, length), generator=torch.Generator().manual_seed(length))
    ids[0, 4:] = ids[1, 9] = ids[2, -1] = spec.end_token_id  # several ends, one in the middle, one at the end
    return ids


def test_a_skipped_layer_is_kept_but_does_not_count() -> None:
    ours, theirs = pair(FIRST)
    ids = ids_of(FIRST)
    with torch.no_grad():
        expected = theirs(ids, output_hidden_states=True).hidden_states[-2]
        assert relative_error(ours(ids), expected) <= 1e-5
        randomize(ours.TransformerLayer_3, seed=7)
        assert relative_error(ours(ids), expected) <= 1e-5
    assert list(ours.state_dict()) == list(CLIPTextEncoder(dataclasses.replace(FIRST, skipped_layers=0)).state_dict())


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_both_outputs_equal_transformers(spec: CLIPTextSpec) -> None:
    ours, theirs = pair(spec)
    ids = ids_of(spec)
    with torch.no_grad():
        expected = theirs(ids, output_hidden_states=True)
        embedding, pooled = ours(ids)
    assert relative_error(embedding, expected.hidden_states[-1 - spec.skipped_layers]) <= 1e-5
    assert relative_error(pooled, expected.text_embeds) <= 1e-5


def test_every_gradient_equals_transformers() -> None:
    ours, theirs = pair(POOLED)
    ids = ids_of(POOLED)
    embedding, pooled = ours(ids)
    (embedding.square().mean() + pooled.square().mean()).backward()
    expected = theirs(ids, output_hidden_states=True)
    (expected.hidden_states[-2].square().mean() + expected.text_embeds.square().mean()).backward()
    names, gradients = text_encoder_names(POOLED), dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        mine = gradients.pop(str(names.to_ours(name))).grad
        if not name.endswith("k_proj.bias"):  # softmax does not see it: the gradient is 0, up to rounding
            assert mine is not None and relative_error(mine, parameter.grad) <= 1e-4, name
    assert not gradients


def test_text_goes_into_both_padded_as_each_wants_it(transformers_tokenizer: TransformersTokenizer) -> None:
    encoder, first, second = double()
    texts = ["a photo of a cat", "Ünïcödé"]
    ids = transformers_tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt")["input_ids"]
    zero_padded = ids.masked_fill((ids == FIRST.end_token_id).cumsum(-1) > 1, 0)
    with torch.no_grad():
        embedding, pooled = encoder(texts)
        of_first = first(ids, output_hidden_states=True).hidden_states[-2]
        of_second = second(zero_padded, output_hidden_states=True)
    assert relative_error(embedding, torch.cat([of_first, of_second.hidden_states[-2]], dim=-1)) <= 1e-5
    assert relative_error(pooled, of_second.text_embeds) <= 1e-5


@torch.no_grad()
def test_plain_prompts_encode_as_text_does() -> None:
    encoder, _, _ = double()
    embedding, pooled = encode_pooled_prompt(encoder, ["a cat", "two dogs"])
    expected, expected_pooled = encoder(["a cat", "two dogs"])
    assert torch.equal(embedding, expected) and torch.equal(pooled, expected_pooled)


@torch.no_grad()
def test_weights_and_chunks_are_those_of_each_encoder_alone() -> None:
    encoder, _, _ = double()
    prompts = ["a (red:1.4) [cat] " + "and a long tail, " * 20, "a (dog:0.5)"]
    embedding, pooled = encode_pooled_prompt(encoder, prompts)
    first, second = encoder.layers(CLIPTextEncoder)
    alone, pooled_alone = encode_pooled_prompt(DoubleTextEncoder(pair(FIRST)[0], pair(POOLED, seed=1)[0]), prompts[1])
    assert embedding.shape == (2, 2 * 77, 16 + 32) and pooled.shape == (2, 24)
    torch.testing.assert_close(embedding[:1, :77, :16], encode_prompt(pair(FIRST)[0], prompts)[:1, :77])
    torch.testing.assert_close(embedding[..., 16:], encode_prompt(pair(POOLED, seed=1)[0], prompts))
    torch.testing.assert_close(embedding[1:, :77], alone)
    torch.testing.assert_close(pooled[1:], pooled_alone)
    assert first.spec == FIRST and second.spec == POOLED


def test_the_text_as_a_whole_is_what_the_first_chunk_says() -> None:
    encoder, _, _ = double()
    with torch.no_grad():
        _, pooled = encode_pooled_prompt(encoder, "a cat BREAK a dog")
        _, expected = encode_pooled_prompt(encoder, "a cat")
    torch.testing.assert_close(pooled, expected)


def test_an_encoder_without_projection_says_so() -> None:
    with pytest.raises(ValueError, match="gives no vector for a text as a whole"):
        encode_pooled_prompt(pair(FIRST)[0], "a cat")
    with pytest.raises(ValueError, match="skipped_layers is 0, but with 3 layers and a projection of 8"):
        dataclasses.replace(SMALL, projection_dim=8)


def test_every_linear_adapts_and_ejects_bit_exactly() -> None:
    encoder, _, _ = double()
    with torch.no_grad():
        before, keys = encoder("a cat"), list(encoder.state_dict())
        adapters = [LoraAdapter(linear, rank=2).inject(parent) for linear, parent in encoder.walk(nn.Linear)]
        for adapter in adapters:
            nn.init.normal_(adapter.loras["lora"].up.weight)
        assert all(not torch.allclose(*both) for both in zip(encoder("a cat"), before, strict=True))
        for adapter in adapters:
            adapter.eject()
        assert all(map(torch.equal, encoder("a cat"), before)) and list(encoder.state_dict()) == keys


def test_copies_are_adapted_apart() -> None:
    encoder, _, _ = double()
    copy = encoder.structural_copy()
    extender = ConceptExtender(next(copy.layers(CLIPTextEncoder)))
    extender.add_concept("<toy>", torch.randn(2, 16))
    extender.inject()
    with torch.no_grad():
        embedding, _ = encode_pooled_prompt(copy, "a <toy>")
        plain, _ = encode_pooled_prompt(encoder, "a <toy>")
    assert embedding.shape == (1, 77, 48) and not torch.allclose(embedding[..., :16], plain[..., :16])
    torch.testing.assert_close(embedding[..., 16:], plain[..., 16:])


@pytest.mark.slow
def test_compiles_into_one_graph() -> None:
    encoder, _, _ = double()
    ids = ids_of(POOLED)
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for ours, theirs in zip(compiled(ids), encoder(ids), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_words_from_a_file_for_both_go_to_each(tmp_path: Path) -> None:
    encoder, _, _ = double()
    vectors = {"clip_l": torch.randn(2, 16), "clip_g": torch.randn(2, 32)}
    save_file(vectors, tmp_path / "<toy>.safetensors")
    with torch.no_grad():
        before, _ = encode_pooled_prompt(encoder, "a <toy>")
        extenders = [ConceptExtender(each) for each in encoder.layers(CLIPTextEncoder)]
        for extender in extenders:
            assert extender.load(tmp_path / "<toy>.safetensors") == ["<toy>"]
            extender.inject()
        after, _ = encode_pooled_prompt(encoder, "a <toy>")
        for part in (slice(None, 16), slice(16, None)):
            assert not torch.allclose(after[..., part], before[..., part])
        for extender in extenders:
            extender.eject()
        assert torch.equal(encode_pooled_prompt(encoder, "a <toy>")[0], before)
    with pytest.raises(ValueError, match="for one text encoder, and this DoubleTextEncoder has several"):
        ConceptExtender(encoder)
