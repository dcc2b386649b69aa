"""New words: they take effect, train, live beside LoRAs, and leave without a trace."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from clip_specimens import SMALL, build_small
from torch import Tensor

import refiners.fluxion.layers as fl
from refiners.adapters.lora import LoraAdapter
from refiners.foundationals.clip.concepts import Concept, ConceptExtender, EmbeddingExtender
from refiners.foundationals.clip.prompts import encode_prompt
from refiners.foundationals.clip.text_encoder import CLIPTextEncoder, TokenEncoder
from refiners.foundationals.clip.tokenizer import CLIPTokenizer
from refiners.weights import write_safetensors

NARROW = dataclasses.replace(SMALL, embedding_dim=8, num_layers=2, num_attention_heads=2)
TEXT = "a photo of a <cat-toy> and ohwx"


@pytest.fixture
def encoder() -> CLIPTextEncoder:
    return build_small(NARROW)


@pytest.fixture
def vectors() -> Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(5))


def extended(encoder: CLIPTextEncoder, vectors: Tensor) -> ConceptExtender:
    extender = ConceptExtender(encoder)
    extender.add_concept("<cat-toy>", vectors[:2])
    extender.add_concept("ohwx", vectors[2])
    return extender


@torch.no_grad()
def test_the_vectors_stand_where_the_words_are(encoder: CLIPTextEncoder, vectors: Tensor) -> None:
    embeddings = encoder.ensure_find(TokenEncoder)
    ids = encoder.CLIPTokenizer("a photo of a x x and x")
    rows = embeddings(ids)
    rows[0, [5, 6, 8]] = vectors
    expected = encoder[3:](rows + encoder.Sum.PositionalEncoder(ids))
    extender = extended(encoder, vectors).inject()
    assert torch.equal(encoder(TEXT), expected) and torch.equal(extender(TEXT), expected)
    assert torch.equal(encode_prompt(encoder, TEXT), expected)
    assert torch.equal(encode_prompt(extender, TEXT.upper()), expected)


@torch.no_grad()
def test_texts_without_new_words_are_as_before(encoder: CLIPTextEncoder, vectors: Tensor) -> None:
    before = encoder("a photo of a cat")
    extended(encoder, vectors).inject()
    assert torch.equal(encoder("a photo of a cat"), before)


@torch.no_grad()
def test_eject_restores_every_object_key_and_bit(encoder: CLIPTextEncoder, vectors: Tensor) -> None:
    modules, keys, before = list(encoder.modules()), list(encoder.state_dict()), encoder(TEXT)
    extender = extended(encoder, vectors)
    assert list(encoder.modules()) == modules and torch.equal(encoder(TEXT), before)
    for _ in range(2):
        extender.inject()
        changed = encoder(TEXT)
        assert not torch.allclose(changed, before)
        extender.eject()
        assert all(a is b for a, b in zip(encoder.modules(), modules, strict=True)) and encoder.parent is None
        assert list(encoder.state_dict()) == keys and torch.equal(encoder(TEXT), before)


def test_keys_of_the_base_do_not_move(encoder: CLIPTextEncoder, vectors: Tensor) -> None:
    base = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    extender = extended(encoder, vectors).inject()
    own = ["Sum.TokenEncoder.EmbeddingExtender.Concept.weight", "Sum.TokenEncoder.EmbeddingExtender.Concept_2.weight"]
    assert [key for key in extender.state_dict() if key not in base] == own
    assert [key for key in encoder.state_dict() if key not in own] == list(base)
    extender.load_state_dict(base)  # a checkpoint of the base leaves the concepts alone
    assert torch.equal(extender.concepts["<cat-toy>"], vectors[:2])


def test_concepts_can_come_while_injected(encoder: CLIPTextEncoder, vectors: Tensor) -> None:
    extender = ConceptExtender(encoder).inject()
    extender.add_concept("<cat-toy>", vectors[:2])
    first = encoder(TEXT)
    extender.add_concept("ohwx", vectors[2])
    assert not torch.equal(encoder(TEXT), first)
    assert torch.equal(encoder(TEXT), extended(build_small(NARROW), vectors).inject()(TEXT))
    assert list(extender.concepts) == ["<cat-toy>", "ohwx"]


def test_only_the_vectors_need_to_train(encoder: CLIPTextEncoder, vectors: Tensor) -> None:
    encoder.requires_grad_(False)
    extender = extended(encoder, vectors).inject()
    given = vectors.clone()
    optimizer = torch.optim.SGD([extender.concepts["<cat-toy>"]], lr=0.1)
    encoder(TEXT).square().mean().backward()
    optimizer.step()
    trained = {name for name, parameter in extender.named_parameters() if parameter.grad is not None}
    assert trained == {key for key in extender.state_dict() if "Concept" in key}
    assert not torch.equal(extender.concepts["<cat-toy>"], given[:2])
    assert torch.equal(extender.concepts["ohwx"], given[2:]) and torch.equal(vectors, given)


@pytest.mark.parametrize("is_lora_first", [True, False])
@torch.no_grad()
def test_loras_and_concepts_live_together(encoder: CLIPTextEncoder, vectors: Tensor, is_lora_first: bool) -> None:
    before, keys = encoder(TEXT), list(encoder.state_dict())
    extender = extended(encoder, vectors)
    if is_lora_first:
        extender.inject()
    loras = [LoraAdapter(target=linear, rank=2).inject(parent) for linear, parent in encoder.walk(fl.Linear)]
    for lora in loras:
        torch.nn.init.normal_(lora.LinearLora.up.weight)
    with_loras = encoder(TEXT)
    if not is_lora_first:
        extender.inject()
    both = encoder(TEXT)
    assert torch.equal(both, with_loras) == is_lora_first and not torch.allclose(both, before)
    extender.eject()
    only_loras = encoder(TEXT)
    assert torch.equal(only_loras, with_loras) != is_lora_first and not torch.allclose(only_loras, both)
    for lora in loras:
        lora.eject()
    assert torch.equal(encoder(TEXT), before) and list(encoder.state_dict()) == keys


def test_the_extender_adapts_an_encoder_inside_a_tree(encoder: CLIPTextEncoder, vectors: Tensor) -> None:
    tree = fl.Chain(encoder, fl.Multiply(2.0))
    keys = list(tree.state_dict())
    extender = extended(encoder, vectors).inject(tree)
    assert tree.CLIPTextEncoder is extender and torch.equal(tree(TEXT), 2 * encoder(TEXT))
    extender.eject()
    assert tree[0] is encoder and list(tree.state_dict()) == keys


@torch.no_grad()
def test_copies_have_concepts_of_their_own(encoder: CLIPTextEncoder, vectors: Tensor) -> None:
    extender = ConceptExtender(encoder).inject()
    extender.add_concept("<cat-toy>", vectors[:2])
    before = encoder(TEXT)
    for clone in (extender.structural_copy(), copy.deepcopy(extender)):
        assert torch.equal(clone(TEXT), before)
        clone.add_concept("ohwx", vectors[2])
        assert not torch.equal(clone(TEXT), before) and torch.equal(encoder(TEXT), before)
        clone.eject()
        assert clone.target.find(EmbeddingExtender) is None and extender.concepts.keys() == {"<cat-toy>"}
        assert torch.equal(encoder(TEXT), before)


def test_concepts_follow_the_encoder(encoder: CLIPTextEncoder, vectors: Tensor) -> None:
    encoder.to(torch.float64)
    extender = extended(encoder, vectors).inject()
    assert {concept.dtype for concept in encoder.layers(Concept)} == {torch.float64}
    assert encoder(TEXT).dtype == torch.float64
    extender.to(torch.bfloat16)
    assert encoder(TEXT).dtype == torch.bfloat16
    extender.eject()
    encoder.to("meta")
    extender.inject()
    assert {concept.device for concept in encoder.layers(Concept)} == {torch.device("meta")}


@pytest.mark.parametrize("shape", [(7,), (2, 7), (0, 8), (1, 1, 8), ()])
def test_a_shape_that_does_not_fit_is_refused(encoder: CLIPTextEncoder, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"the embedding of '<x>' has shape .* takes \(8,\) or \(n, 8\)"):
        ConceptExtender(encoder).add_concept("<x>", torch.zeros(shape))


@pytest.mark.parametrize("is_injected", [True, False])
def test_a_word_that_is_there_is_refused_and_nothing_changes(
    encoder: CLIPTextEncoder, vectors: Tensor, is_injected: bool
) -> None:
    extender = extended(encoder, vectors)
    if is_injected:
        extender.inject()
    with pytest.raises(ValueError, match="there is a token '<CAT-TOY>' already"):
        extender.add_concept("<CAT-TOY>", vectors[0])
    assert list(extender.concepts) == ["<cat-toy>", "ohwx"]
    extender.add_concept("third", vectors[0])
    if not is_injected:
        extender.inject()
    assert encoder.ensure_find(CLIPTokenizer).new_tokens["third"] == (49411,)


def test_ids_that_no_concept_has_are_refused(encoder: CLIPTextEncoder, vectors: Tensor) -> None:
    extended(encoder, vectors).inject()
    encoder(torch.tensor([[49410]]))
    with pytest.raises(IndexError):
        encoder(torch.tensor([[49411]]))


def test_one_extender_per_encoder(encoder: CLIPTextEncoder, vectors: Tensor) -> None:
    first, second = extended(encoder, vectors), ConceptExtender(encoder)
    first.inject()
    with pytest.raises(RuntimeError, match="has a ConceptExtender already: add the concepts to that one"):
        second.inject()
    assert encoder.parent is first


def test_words_of_a_file_mean_what_its_vectors_do(encoder: CLIPTextEncoder, vectors: Tensor, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "learned.safetensors", {"<cat-toy>": vectors[:2], "ohwx": vectors[2]})
    expected = extended(build_small(NARROW), vectors).inject()(TEXT)
    extender = ConceptExtender(encoder)
    assert extender.load(tmp_path / "learned.safetensors") == ["<cat-toy>", "ohwx"]
    assert torch.equal(extender.inject()(TEXT), expected)


def test_a_file_without_a_word_gives_its_own_name_or_the_one_asked_for(
    encoder: CLIPTextEncoder, vectors: Tensor, tmp_path: Path
) -> None:
    write_safetensors(tmp_path / "toy.safetensors", {"clip_g": torch.ones(2, 12), "clip_l": vectors})
    extender = ConceptExtender(encoder)
    assert extender.load(tmp_path / "toy.safetensors") == ["toy"]
    assert extender.load(tmp_path / "toy.safetensors", token="<toy>") == ["<toy>"]
    assert all(torch.equal(each, vectors) for each in extender.concepts.values())


def test_a_file_of_which_one_word_cannot_be_added_adds_none(
    encoder: CLIPTextEncoder, vectors: Tensor, tmp_path: Path
) -> None:
    extender = extended(encoder, vectors)
    before = extender.concepts
    cases: dict[str, tuple[dict[str, Tensor], dict[str, str], str]] = {
        "taken": ({"<new>": vectors, "OHWX": vectors[0]}, {}, "there is a token 'OHWX' already"),
        "wide": ({"<new>": vectors, "<wide>": torch.ones(1, 12)}, {}, r"of '<wide>' has shape \(1, 12\)"),
        "renamed": ({"<new>": vectors, "<other>": vectors}, {"token": "x"}, "has 2 words .*, so they keep their names"),
    }
    for name, (tensors, options, reason) in cases.items():
        write_safetensors(tmp_path / name, tensors)
        with pytest.raises(ValueError, match=f"{name}.*{reason}"):
            extender.load(tmp_path / name, **options)
        assert extender.concepts.keys() == before.keys()
