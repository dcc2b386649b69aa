"""The configuration files of text encoders and tokenizers in diffusers' folders, from and to our specs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refiners.foundationals.clip.text_encoder import CLIPTextSpec
from refiners.foundationals.clip.tokenizer import END, START, load_vocabulary
from refiners.foundationals.latent_diffusion.files.checked_options import Config, check_fixed

TEXT_ENCODER_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("quick_gelu", "gelu"),
    "model_type": ("clip_text_model",),
}
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


def read_text_encoder(
    config: Config, where: str, tokenizer: Config, skipped_layers: int, is_projected: bool
) -> CLIPTextSpec:
    """The sizes of a text encoder.

    tokenizer: its settings, of which the padding counts.
    skipped_layers, is_projected: as the pipeline uses the encoder, which its own file does not tell.
    Raises ValueError, KeyError for what is none of ours, or incomplete.
    """
    check_fixed(config, TEXT_ENCODER_FIXED, where)
    padding: Any = tokenizer.get("pad_token", END)
    is_end = END in (padding, padding["content"] if isinstance(padding, dict) else None)
    return CLIPTextSpec(
        embedding_dim=config["hidden_size"],
        max_sequence_length=config.get("max_position_embeddings", 77),
        vocabulary_size=config.get("vocab_size", 49408),
        num_layers=config["num_hidden_layers"],
        num_attention_heads=config["num_attention_heads"],
        feedforward_dim=config["intermediate_size"],
        layer_norm_eps=config.get("layer_norm_eps", 1e-5),
        use_quick_gelu=config.get("hidden_act", "quick_gelu") == "quick_gelu",
        pad_token_id=None if is_end else 0,
        skipped_layers=skipped_layers,
        projection_dim=config["projection_dim"] if is_projected else 0,
    )


def text_encoder_config(spec: CLIPTextSpec) -> dict[str, Any]:
    """The `config.json` of a text encoder."""
    return {
        "architectures": ["CLIPTextModelWithProjection" if spec.projection_dim else "CLIPTextModel"],
        "bos_token_id": spec.vocabulary_size - 2,
        "eos_token_id": spec.end_token_id,
        "hidden_act": "quick_gelu" if spec.use_quick_gelu else "gelu",
        "hidden_size": spec.embedding_dim,
        "intermediate_size": spec.feedforward_dim,
        "layer_norm_eps": spec.layer_norm_eps,
        "max_position_embeddings": spec.max_sequence_length,
        "model_type": "clip_text_model",
        "num_attention_heads": spec.num_attention_heads,
        "num_hidden_layers": spec.num_layers,
        **({"projection_dim": spec.projection_dim} if spec.projection_dim else {}),
        "vocab_size": spec.vocabulary_size,
    }


def tokenizer_files(folder: str, spec: CLIPTextSpec, vocabulary: Path) -> Mapping[str, Any]:
    """The contents of the files of a tokenizer, by their names with the folder's."""
    padding = END if spec.pad_token_id is None else "!"
    ids = load_vocabulary(str(vocabulary)).get_vocab()
    by_id = dict(sorted(ids.items(), key=lambda item: item[1]))
    special = {"bos_token": START, "eos_token": END, "pad_token": padding, "unk_token": END}
    return {
        f"{folder}/vocab.json": json.dumps(by_id, ensure_ascii=False),
        f"{folder}/merges.txt": vocabulary.read_text(encoding="utf-8"),
        f"{folder}/special_tokens_map.json": special,
        f"{folder}/tokenizer_config.json": {
            **special,
            "model_max_length": spec.max_sequence_length,
            "tokenizer_class": "CLIPTokenizer",
        },
    }
