"""Files of weight updates (LoRA and its kin): from the keys of any format to places in a model, and back."""

from refiners.weights.lora_keys.kinds import Key, Kind, split_key
from refiners.weights.lora_keys.places import (
    CLIP_TEXT_ENCODER,
    UNET,
    XL_TEXT_ENCODER,
    XL_TEXT_ENCODER_2,
    XL_UNET,
    Component,
    Place,
    Places,
)
from refiners.weights.lora_keys.reading import LoraFile, read_lora
from refiners.weights.lora_keys.settings import Settings, parse_settings
from refiners.weights.lora_keys.updates import (
    LeftOut,
    LoraContents,
    LoraUpdate,
    alpha_of,
    check_finite,
    fit_parts,
    is_finite,
    parse_updates,
    starts_with_rank,
    strange_types,
)
from refiners.weights.lora_keys.writing import LoraFormat, check_format, format_updates, save_updates

__all__ = [
    "CLIP_TEXT_ENCODER",
    "UNET",
    "XL_TEXT_ENCODER",
    "XL_TEXT_ENCODER_2",
    "XL_UNET",
    "Component",
    "Key",
    "Kind",
    "LeftOut",
    "LoraContents",
    "LoraFile",
    "LoraFormat",
    "LoraUpdate",
    "Place",
    "Places",
    "Settings",
    "alpha_of",
    "check_finite",
    "check_format",
    "fit_parts",
    "format_updates",
    "is_finite",
    "parse_settings",
    "parse_updates",
    "read_lora",
    "save_updates",
    "split_key",
    "starts_with_rank",
    "strange_types",
]
