"""CLIP: text encoders, their tokenizer, weighted prompts and new words."""

from refiners.foundationals.clip.concepts import ConceptExtender
from refiners.foundationals.clip.double_text_encoder import DoubleTextEncoder
from refiners.foundationals.clip.image_encoder import (
    CLIP_IMAGE_G,
    CLIP_IMAGE_H,
    CLIP_IMAGE_L,
    CLIPImageEncoder,
    CLIPImageEncoderG,
    CLIPImageEncoderH,
    CLIPImageEncoderL,
    CLIPImageSpec,
)
from refiners.foundationals.clip.image_encoder_names import load_clip_image_encoder
from refiners.foundationals.clip.prompts import encode_pooled_prompt, encode_prompt, parse_prompt, token_weights
from refiners.foundationals.clip.text_encoder import (
    CLIP_G,
    CLIP_H,
    CLIP_H_24,
    CLIP_L,
    SDXL_CLIP_G,
    SDXL_CLIP_L,
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
    "CLIP_IMAGE_G",
    "CLIP_IMAGE_H",
    "CLIP_IMAGE_L",
    "CLIP_L",
    "SDXL_CLIP_G",
    "SDXL_CLIP_L",
    "CLIPImageEncoder",
    "CLIPImageEncoderG",
    "CLIPImageEncoderH",
    "CLIPImageEncoderL",
    "CLIPImageSpec",
    "CLIPTextEncoder",
    "CLIPTextEncoderG",
    "CLIPTextEncoderH",
    "CLIPTextEncoderL",
    "CLIPTextSpec",
    "CLIPTokenizer",
    "ConceptExtender",
    "DoubleTextEncoder",
    "TruncationWarning",
    "encode_pooled_prompt",
    "encode_prompt",
    "load_clip_image_encoder",
    "parse_prompt",
    "token_weights",
]
