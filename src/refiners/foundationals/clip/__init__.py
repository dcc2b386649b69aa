"""CLIP: text encoders, their tokenizer, weighted prompts and new words."""

from refiners.foundationals.clip.concepts import ConceptExtender
from refiners.foundationals.clip.prompts import encode_prompt, parse_prompt, token_weights
from refiners.foundationals.clip.text_encoder import (
    CLIP_G,
    CLIP_H,
    CLIP_H_24,
    CLIP_L,
    CLIPTextEncoder,
    CLIPTextEncoderG,
    CLIPTextEncoderH,
    CLIPTextEncoderL,
    CLIPTextSpec,
)
from refiners.foundationals.clip.tokenizer import CLIPTokenizer, TruncationWarning

__all__ = [
    "CLIP_G",
    "CLIP_H",
    "CLIP_H_24",
    "CLIP_L",
    "CLIPTextEncoder",
    "CLIPTextEncoderG",
    "CLIPTextEncoderH",
    "CLIPTextEncoderL",
    "CLIPTextSpec",
    "CLIPTokenizer",
    "ConceptExtender",
    "TruncationWarning",
    "encode_prompt",
    "parse_prompt",
    "token_weights",
]
