"""The text encoder against transformers': outputs of every block and all gradients, at random weights."""

import dataclasses

import pytest
import torch
from clip_specimens import SMALL, build_pair, build_small, relative_error
from torch import Tensor
from transformers import CLIPTokenizer as TransformersTokenizer

from refiners.foundationals.clip.names import text_encoder_names
from refiners.foundationals.clip.text_encoder import (
    CLIP_G,
    CLIP_H,
    CLIP_L,
    CLIPTextEncoder,
    CLIPTextEncoderG,
    CLIPTextEncoderH,
    CLIPTextEncoderL,
    CLIPTextSpec,
    TransformerLayer,
)
from refiners.foundationals.clip.tokenizer import CLIPTokenizer

TINY = dataclasses.replace(SMALL, vocabulary_size=200)  # for ids, where SMALL has room for all that texts give
SPECS = [
    TINY,
    dataclasses.replace(TINY, use_quick_gelu=True),
    dataclasses.replace(TINY, num_layers=1, layer_norm_eps=1e-3),
    dataclasses.replace(TINY, max_sequence_length=20, num_attention_heads=1),
]
TOLERANCE = 1e-5


def random_ids(spec: CLIPTextSpec, length: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(spec.vocabulary_size, (batch, length), generator=generator)


def hidden_states(encoder: CLIPTextEncoder, ids: Tensor) -> list[Tensor]:
    """The sum of the embeddings, what each layer gives, the output: as transformers lists them."""
    states: list[Tensor] = []
    parts = [encoder.Sum, *encoder.layers(TransformerLayer)]
    hooks = [part.register_forward_hook(lambda module, inputs, output: states.append(output)) for part in parts]
    states.append(encoder(ids))
    for hook in hooks:
        hook.remove()
    return states


@pytest.mark.parametrize("spec", SPECS, ids=["gelu", "quick_gelu", "one_layer", "short"])
class TestEqualsTransformers:
    @pytest.mark.parametrize("length", [1, 13, 77])
    def test_in_every_hidden_state(self, spec: CLIPTextSpec, length: int) -> None:
        ours, theirs = build_pair(spec)
        ids = random_ids(spec, min(length, spec.max_sequence_length))
        with torch.no_grad():
            expected = theirs(ids, output_hidden_states=True)
            states = hidden_states(ours, ids)
        for ours_here, theirs_here in zip(states, [*expected.hidden_states, expected.last_hidden_state], strict=True):
            assert relative_error(ours_here, theirs_here) <= TOLERANCE

    def test_in_every_gradient(self, spec: CLIPTextSpec) -> None:
        ours, theirs = build_pair(spec)
        ids = random_ids(spec, min(13, spec.max_sequence_length))
        weights = torch.randn(*ids.shape, spec.embedding_dim, generator=torch.Generator().manual_seed(1))
        (ours(ids) * weights).sum().backward()
        (theirs(ids).last_hidden_state * weights).sum().backward()
        names, gradients = text_encoder_names(spec, prefix=""), dict(ours.named_parameters())
        for name, parameter in theirs.named_parameters():
            mine = gradients.pop(names.to_ours(name)).grad
            if name.endswith("k_proj.bias"):  # softmax does not see it: the gradient is 0, up to rounding
                assert mine.abs().max() <= 1e-3 and parameter.grad.abs().max() <= 1e-3
            else:
                assert relative_error(mine, parameter.grad) <= TOLERANCE, name
        assert not gradients


def test_text_goes_in_as_text(transformers_tokenizer: TransformersTokenizer) -> None:
    ours, theirs = build_pair(dataclasses.replace(SMALL, pad_token_id=None))
    texts = ["a photo of a cat", "Ünïcödé 😀"]
    ids = transformers_tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert relative_error(ours(texts), theirs(ids).last_hidden_state) <= TOLERANCE
        assert torch.equal(ours(texts)[:1], ours(texts[0])) and ours("").shape == (1, 77, 32)


def test_only_what_came_before_counts() -> None:
    encoder, ids = build_small(TINY), random_ids(TINY, 13)
    changed = ids.clone()
    changed[:, 7:] = 5
    with torch.no_grad():
        torch.testing.assert_close(encoder(ids)[:, :7], encoder(changed)[:, :7])
        torch.testing.assert_close(encoder(ids[:, :7]), encoder(ids)[:, :7])


def test_too_many_ids_are_refused() -> None:
    with pytest.raises(ValueError, match="78 token ids, but this encoder has only 77 positions"):
        build_small(TINY)(random_ids(TINY, 78))


def test_a_tokenizer_of_ones_own() -> None:
    tokenizer = CLIPTokenizer(sequence_length=9, pad_token_id=7)
    encoder = CLIPTextEncoder(SMALL, tokenizer=tokenizer)
    assert encoder.CLIPTokenizer is tokenizer and encoder("a cat").shape == (1, 9, 32)


@pytest.mark.parametrize(
    ("kind", "spec", "parameters"),
    [
        (CLIPTextEncoderL, CLIP_L, 123_060_480),
        (CLIPTextEncoderH, CLIP_H, 340_387_840),
        (CLIPTextEncoderG, CLIP_G, 693_021_440),
    ],
)
def test_the_named_encoders(kind: type[CLIPTextEncoderL], spec: CLIPTextSpec, parameters: int) -> None:
    encoder = kind(device="meta", dtype=torch.float16)
    assert encoder.spec == spec and encoder.dtype == torch.float16 and encoder.device == torch.device("meta")
    assert {tensor.dtype for tensor in encoder.parameters()} == {torch.float16}
    assert sum(tensor.numel() for tensor in encoder.parameters()) == parameters
    assert encoder.CLIPTokenizer.pad_token_id == (49407 if spec is CLIP_L else 0)


@pytest.mark.slow
def test_compiles_into_one_graph() -> None:
    encoder, ids = build_small(TINY), random_ids(TINY, 13)
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids), encoder(ids))
