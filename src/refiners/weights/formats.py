"""What is this file? Content, format and model family, told from the names and shapes of its tensors alone."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from refiners.weights.header import read_header
from refiners.weights.lora_keys.kinds import Kind, split_key
from refiners.weights.torch_files import is_torch_file, read_torch

Shapes = Mapping[str, tuple[int, ...]]


class Content(StrEnum):
    """What a file holds."""

    CHECKPOINT = "whole model"
    UNET = "UNet"
    AUTOENCODER = "autoencoder"
    TEXT_ENCODER = "text encoder"
    LORA = "LoRA"
    TEXTUAL_INVERSION = "textual inversion"
    CONTROLNET = "ControlNet"
    T2I_ADAPTER = "T2I-Adapter"
    IP_ADAPTER = "IP-Adapter"
    TRANSFORMER = "diffusion transformer"
    UNKNOWN = "unknown"


class Family(StrEnum):
    """Which models a file goes with."""

    SD1 = "Stable Diffusion 1"
    SD2 = "Stable Diffusion 2"
    SDXL = "Stable Diffusion XL"
    SD3 = "Stable Diffusion 3"
    FLUX = "FLUX"


@dataclass(frozen=True)
class Identity:
    """What a file is; its text is a sentence.

    form: whose names it has: "diffusers", "kohya", …
    family: None if nothing in the file tells.
    evidence: what was seen that told so.
    nearest: of an unknown file, what it is most like, and what it lacks for that.
    """

    content: Content
    form: str = ""
    family: Family | None = None
    evidence: tuple[str, ...] = ()
    nearest: str | None = None

    def __str__(self) -> str:
        if self.content is Content.UNKNOWN:
            return f"a file of unknown content{f'; {self.nearest}' if self.nearest else ''}"
        family = f" of {self.family}" if self.family else ""
        seen = f" ({', '.join(self.evidence)})" if self.evidence else ""
        return f"{self.content}{family}, with the names of {self.form}{seen}"


@dataclass(frozen=True)
class _Signature:
    """Starts of names that all have to be there; `#` stands for a number, and a prefix may come before them."""

    content: Content
    form: str
    marks: tuple[str, ...]
    prefix: str = ""

    def has(self, mark: str, text: str) -> bool:
        """Whether a line of `text` starts so."""
        pattern = re.escape(mark).replace(re.escape("#"), r"\d+")
        return re.search(rf"^(?:{re.escape(self.prefix)})?{pattern}", text, re.MULTILINE) is not None


# The first that fits counts: what contains something else stands before it.
_ORIGINAL = "the original files"
_SIGNATURES = (
    _Signature(Content.CHECKPOINT, _ORIGINAL, ("model.diffusion_model.input_blocks.", "first_stage_model.")),
    _Signature(Content.TRANSFORMER, _ORIGINAL, ("double_blocks.#.img_attn",), "model.diffusion_model."),
    _Signature(Content.TRANSFORMER, _ORIGINAL, ("joint_blocks.#.x_block",), "model.diffusion_model."),
    _Signature(Content.TRANSFORMER, "diffusers", ("transformer_blocks.0.attn.", "x_embedder.")),
    _Signature(Content.CONTROLNET, "diffusers", ("controlnet_cond_embedding.", "controlnet_down_blocks.")),
    _Signature(Content.CONTROLNET, "Stability AI's control LoRAs", ("lora_controlnet",)),
    _Signature(Content.CONTROLNET, _ORIGINAL, ("input_hint_block.", "zero_convs."), "control_model."),
    _Signature(Content.CONTROLNET, "Refiners", ("SetContextDefault.ConditionEncoder.", "ControlOutputs.")),
    _Signature(Content.IP_ADAPTER, "its authors", ("image_proj.", "ip_adapter.")),
    _Signature(Content.T2I_ADAPTER, "diffusers", ("adapter.body.#.resnets.",)),
    _Signature(Content.T2I_ADAPTER, "its authors", ("body.#.block1.", "conv_in.")),
    _Signature(Content.T2I_ADAPTER, "Refiners", ("Cascade.FeatureLevel_#.",)),
    _Signature(Content.UNET, "diffusers", ("down_blocks.0.", "up_blocks.0.", "mid_block.", "time_embedding.linear_1.")),
    _Signature(
        Content.UNET,
        _ORIGINAL,
        ("input_blocks.0.0.", "output_blocks.0.0.", "time_embed.0."),
        "model.diffusion_model.",
    ),
    _Signature(Content.UNET, "Refiners", ("DownBlocks.Chain_1.", "UpBlocks.Chain_1.", "MiddleBlock.")),
    _Signature(Content.AUTOENCODER, "diffusers", ("encoder.down_blocks.0.", "decoder.up_blocks.0.", "quant_conv.")),
    _Signature(
        Content.AUTOENCODER, _ORIGINAL, ("encoder.down.0.block.0.", "decoder.up.0.block.0."), "first_stage_model."
    ),
    _Signature(Content.AUTOENCODER, "Refiners", ("Encoder.EncoderLevel_1.", "Decoder.DecoderLevel_1.")),
    _Signature(
        Content.TEXT_ENCODER,
        "transformers",
        ("encoder.layers.0.self_attn.q_proj.", "embeddings.token_embedding."),
        "text_model.",
    ),
    _Signature(
        Content.TEXT_ENCODER,
        "OpenCLIP",
        ("transformer.resblocks.0.attn.in_proj_weight", "token_embedding."),
        "cond_stage_model.model.",
    ),
    _Signature(Content.TEXT_ENCODER, "Refiners", ("Sum.TokenEncoder.", "TransformerLayer")),
)
_LORA_FORMS = (
    ("the first Refiners", r"(unet|text_encoder|lda)\.\d{3,}$"),
    ("kohya", r"(lora_(unet|te\d?|transformer)|oft_unet)_"),
    ("LyCORIS", r"lycoris_"),
    ("OneTrainer", r"(lora_unet|lora_te\d?)\."),
    ("diffusers' attention processors", r".*\.processor\."),
    ("peft", r"(.*\.)?base_model\.model\."),
    ("ComfyUI", r"(model\.)?diffusion_model\."),
    ("diffusers", r""),
)
TEXT_FAMILIES = {768: Family.SD1, 1024: Family.SD2, 2048: Family.SDXL}
_TOKEN_WIDTHS = {768: Family.SD1, 1024: Family.SD2, 1280: Family.SDXL}
_FAMILY_MARKS = (  # patterns that are in the names of one family only
    (Family.FLUX, r"(?:^|.*[._])(?:double_blocks|single_blocks|single_transformer_blocks)[._]\d"),
    (Family.SD3, r"(?:^|.*[._])joint_blocks[._]\d"),
    (Family.SDXL, r"(?:lora_te2_|lora_te2\.|text_encoder_2\.|clip_g(?:\.|$)|conditioner\.embedders\.1\.)"),
    (Family.SDXL, r"(?:conditioner\.embedders\.0\.|text_encoders\.clip_g\.|add_embedding\.linear_1\.)"),
    (Family.SD2, r"cond_stage_model\.model\.transformer\.resblocks\."),
    (Family.SD1, r"cond_stage_model\.transformer\.text_model\."),
)
_CROSS_ATTENTION = re.compile(r"(?:.*attn2[._](?:processor\.)?to_[kv](?:_lora)?|ip_adapter\.\d+\.to_[kv]_ip)\.(.+)$")
A1111_NAMES = {"emb_params", "*"}  # of vectors, where the word is the name of the file
_EMBEDDING = re.compile(r"(?:emb_params|clip_l|clip_g|<.+>|[^.]{1,60})")


def identify_file(path: Path | str) -> Identity:
    """Say what a weights file is; of a safetensors file only the header is read.

    Raises ValueError if the file is damaged or no weights file, FileNotFoundError, IsADirectoryError.
    """
    if is_torch_file(path):
        return identify({name: tuple(tensor.shape) for name, tensor in read_torch(path).items()})
    return identify({name: info.shape for name, info in read_header(path).tensors.items()})


def identify(shapes: Shapes) -> Identity:
    """Say what a set of tensors is, by their names and shapes."""
    lora = _identify_lora(shapes)
    if lora:
        return lora
    text = "\n".join(shapes)
    for signature in _SIGNATURES:
        if all(signature.has(mark, text) for mark in signature.marks):
            return Identity(signature.content, signature.form, *_family(shapes, text))
    if 0 < len(shapes) <= 64 and all(_EMBEDDING.fullmatch(name) and len(shape) <= 2 for name, shape in shapes.items()):
        form = "A1111" if shapes.keys() & A1111_NAMES else "diffusers"
        return Identity(Content.TEXTUAL_INVERSION, form, *_family_of_embedding(shapes))
    return Identity(Content.UNKNOWN, nearest=_nearest_miss(text))


def _identify_lora(shapes: Shapes) -> Identity | None:
    """What kinds of update there are, if most of the keys are of updates; alphas and biases are no evidence."""
    numbered = re.compile(_LORA_FORMS[0][1])
    kinds = {name: _kind(name, numbered) for name in shapes}
    counted = Counter(kind for kind in kinds.values() if kind is not None)
    neutral = sum(kind is None and name.endswith((".alpha", ".bias")) for name, kind in kinds.items())
    if not counted or 2 * counted.total() < len(shapes) - neutral:
        return None
    first = next(name for name, kind in kinds.items() if kind is not None)
    form = next(form for form, pattern in _LORA_FORMS if re.match(pattern, first))
    family, evidence = _family(shapes, "\n".join(shapes))
    special = sorted(str(kind) for kind in counted if kind is not Kind.LORA)
    return Identity(Content.LORA, form, family, (*evidence, *special))


def _kind(name: str, numbered: re.Pattern[str]) -> Kind | None:
    """The kind of update that a name is part of, or None if it is of none, or says nothing of it."""
    if numbered.match(name):
        return Kind.LORA
    key = split_key(name)
    return None if key is None or key.kind is Kind.WHOLE else key.kind


def _family(shapes: Shapes, text: str) -> tuple[Family | None, tuple[str, ...]]:
    for family, pattern in _FAMILY_MARKS:
        found = re.search(rf"^{pattern}.*$", text, re.MULTILINE)
        if found:
            return family, (f"it has {found[0]!r}",)
    for width in _text_widths(shapes):
        return TEXT_FAMILIES.get(width), (f"it reads text {width} wide",)
    for name, shape in shapes.items():
        if name.endswith("token_embedding.weight") and len(shape) == 2:
            return _TOKEN_WIDTHS.get(shape[1]), (f"its token embedding is {shape[1]} wide",)
    return None, ()


def _text_widths(shapes: Shapes) -> Iterator[int]:
    """How wide the text is that cross-attention reads: by the weights of its keys and values, or updates of them."""
    for name, shape in shapes.items():
        found = _CROSS_ATTENTION.match(name)
        if found is None or len(shape) < 2:
            continue
        key = split_key(name)
        if found[1] in ("weight", "down") or (key is not None and key.part == "down"):
            yield shape[1]


def _family_of_embedding(shapes: Shapes) -> tuple[Family | None, tuple[str, ...]]:
    if {"clip_l", "clip_g"} <= set(shapes):
        return Family.SDXL, ("it has an embedding for each of two text encoders",)
    width = next(iter(shapes.values()))[-1:]
    return (_TOKEN_WIDTHS.get(width[0]), (f"its embedding is {width[0]} wide",)) if width else (None, ())


def _nearest_miss(text: str) -> str | None:
    def share(signature: _Signature) -> float:
        return sum(signature.has(mark, text) for mark in signature.marks) / len(signature.marks)

    best = max(_SIGNATURES, key=share)
    if not share(best):
        return None
    missing = next(mark for mark in best.marks if not best.has(mark, text))
    return f"it is most like {best.content} with the names of {best.form}, but has nothing called {missing!r}"
