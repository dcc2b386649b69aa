"""What the tests of CLIP share: a small encoder, and transformers' tokenizer and models with the same contents."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from refiners.foundationals.clip.names import text_encoder_names
from refiners.foundationals.clip.text_encoder import CLIPTextEncoder, CLIPTextSpec
from refiners.foundationals.clip.tokenizer import VOCABULARY_PATH

SMALL = CLIPTextSpec(
    embedding_dim=32, num_layers=3, num_attention_heads=4, feedforward_dim=80, vocabulary_size=49408, pad_token_id=0
)


def load_transformers_tokenizer(folder: Path, vocabulary_path: Path = VOCABULARY_PATH) -> CLIPTokenizer:
    """Write the vocabulary as transformers' two files, ids worked out as CLIP's first release did, and load those."""
    merges = vocabulary_path.read_text(encoding="utf-8").splitlines()[1:]
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]
    words = letters + [f"{letter}</w>" for letter in letters] + [merge.replace(" ", "") for merge in merges]
    ids = {word: index for index, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def config_of(spec: CLIPTextSpec) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=spec.vocabulary_size,
        hidden_size=spec.embedding_dim,
        intermediate_size=spec.feedforward_dim,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_attention_heads,
        max_position_embeddings=spec.max_sequence_length,
        hidden_act="quick_gelu" if spec.use_quick_gelu else "gelu",
        layer_norm_eps=spec.layer_norm_eps,
        projection_dim=spec.embedding_dim,
        bos_token_id=spec.vocabulary_size - 2,
        eos_token_id=spec.vocabulary_size - 1,
        pad_token_id=spec.vocabulary_size - 1,
    )


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Give every parameter values that matter: norms are not 1, biases not 0, attention is not flat."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name.lower() and name.endswith("weight")
            fan_in = parameter.shape[-1] if parameter.ndim == 2 and "embedding" not in name.lower() else 4
            parameter.copy_(1 + 0.3 * values if is_norm else 1.5 * values / fan_in**0.5)


def build_pair(spec: CLIPTextSpec, seed: int = 0) -> tuple[CLIPTextEncoder, CLIPTextModel]:
    """Our encoder and transformers' with the same random weights, carried over by the rules of names."""
    theirs = CLIPTextModel(config_of(spec)).eval()
    randomize(theirs, seed)
    names = text_encoder_names(spec, prefix="")
    ours = CLIPTextEncoder(spec)
    ours.load_state_dict({names.to_ours(name): tensor.clone() for name, tensor in theirs.state_dict().items()})
    return ours, theirs


def build_small(spec: CLIPTextSpec = SMALL) -> CLIPTextEncoder:
    encoder = CLIPTextEncoder(spec)
    randomize(encoder)
    return encoder


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
