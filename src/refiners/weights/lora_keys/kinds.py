"""What the parts of a weight update are called at the end of a key, and which kind of update they make up.

A key is the name of a layer, then the name of a part: `lora_unet_mid_block_attentions_0_proj_in.lora_down.weight`.
"""

from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    """A kind of update, by the name that people know it by."""

    LORA = "LoRA"
    ADALORA = "AdaLoRA"
    DORA = "DoRA"
    LOHA = "LoHa"
    LOKR = "LoKr"
    GLORA = "GLoRA"
    ELEMENTWISE_GLORA = "elementwise GLoRA"
    IA3 = "(IA)^3"
    OFT = "OFT"
    BOFT = "BOFT"
    DIFFERENCE = "full difference"
    NORM = "norm difference"
    EMBEDDING = "LoRA of an embedding"
    BIAS = "LoRA with a bias"
    SCALAR = "LoRA with a learned scale"
    VERA = "VeRA"
    WHOLE = "whole weight"
    CUSTOM = "Custom Diffusion"

    @property
    def with_article(self) -> str:
        """As in a sentence.

        >>> Kind.LORA.with_article, Kind.OFT.with_article
        ('a LoRA', 'an OFT')
        """
        starts_with_vowel = self in (Kind.ADALORA, Kind.ELEMENTWISE_GLORA, Kind.OFT, Kind.IA3)
        return f"{'an' if starts_with_vowel else 'a'} {self}"


class Key(NamedTuple):
    """A key taken apart: which layer it names, and which part of which kind of update it holds.

    kind: None for what says nothing of the kind, as `alpha`.
    """

    layer: str
    kind: Kind | None
    part: str


# In these, `*` stands for one word: the name that peft gives to the adapter.
_PARTS: dict[str, tuple[Kind | None, str]] = {
    "alpha": (None, "alpha"),
    "lora.alpha": (None, "alpha"),
    "lora_linear_layer.alpha": (None, "alpha"),
    "lora_mid.weight": (Kind.LORA, "mid"),
    "dora_scale": (Kind.DORA, "magnitude"),
    "lora_magnitude_vector": (Kind.DORA, "magnitude"),
    "lora_magnitude_vector.*": (Kind.DORA, "magnitude"),
    "lora_magnitude_vector.*.weight": (Kind.DORA, "magnitude"),
    "lora_up.bias": (Kind.BIAS, "bias"),
    "lora_B.bias": (Kind.BIAS, "bias"),
    "lora_B.*.bias": (Kind.BIAS, "bias"),
    "lora_E": (Kind.ADALORA, "values"),
    "lora_E.*": (Kind.ADALORA, "values"),
    "scalar": (Kind.SCALAR, "scalar"),
    "diff": (Kind.DIFFERENCE, "weight"),
    "diff_b": (Kind.DIFFERENCE, "bias"),
    "w_norm": (Kind.NORM, "weight"),
    "b_norm": (Kind.NORM, "bias"),
    "on_input": (Kind.IA3, "on_input"),
    "oft_blocks": (Kind.OFT, "blocks"),
    "oft_diag": (Kind.OFT, "diag"),
    "oft_R.weight": (Kind.OFT, "blocks"),
    "oft_R.*.weight": (Kind.OFT, "blocks"),
    "rescale": (Kind.OFT, "rescale"),
    "oft_terms": (Kind.OFT, "terms"),  # ours, as peft has it in its settings
    "ln_tuning_layers.weight": (Kind.WHOLE, "weight"),
    "ln_tuning_layers.bias": (Kind.WHOLE, "bias"),
    "modules_to_save.*.weight": (Kind.WHOLE, "weight"),
    "modules_to_save.*.bias": (Kind.WHOLE, "bias"),
    "set_weight": (Kind.WHOLE, "weight"),
    "base_layer.weight": (Kind.WHOLE, "weight"),
    "base_layer.bias": (Kind.WHOLE, "bias"),
    "weight": (Kind.WHOLE, "weight"),
    "bias": (Kind.WHOLE, "bias"),
}
for _ours, _names in {"down": ("down", "A"), "up": ("up", "B")}.items():
    _PARTS[f"lora_{_names[0]}.weight"] = (Kind.LORA, _ours)
    _PARTS[f"lora_{_names[1]}.weight"] = (Kind.LORA, _ours)
    _PARTS[f"lora_{_names[1]}.*.weight"] = (Kind.LORA, _ours)
    _PARTS[f"lora.{_names[0]}.weight"] = (Kind.LORA, _ours)
    _PARTS[f"lora_linear_layer.{_names[0]}.weight"] = (Kind.LORA, _ours)
    _PARTS[f"lora_embedding_{_names[1]}"] = (Kind.EMBEDDING, _ours)
    _PARTS[f"lora_embedding_{_names[1]}.*"] = (Kind.EMBEDDING, _ours)
    _PARTS[f"lora_{_names[1]}"] = (Kind.ADALORA, _ours)
    _PARTS[f"lora_{_names[1]}.*"] = (Kind.ADALORA, _ours)
for _stem, _kind, _factors in (
    ("hada", Kind.LOHA, ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    ("lokr", Kind.LOKR, ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t1", "t2")),
    ("boft", Kind.BOFT, ("R", "s", "S")),
    ("ia3", Kind.IA3, ("l",)),
    ("vera", Kind.VERA, ("A", "B", "lambda_b", "lambda_d")),
):
    for _factor in _factors:
        _PARTS[f"{_stem}_{_factor}"] = (_kind, _factor)
        _PARTS[f"{_stem}_{_factor}.*"] = (_kind, _factor)
for _factor in ("a1", "a2", "b1", "b2", "bm"):
    _PARTS[f"{_factor}.weight"] = (Kind.GLORA, _factor)
for _path in "ABCDE":
    for _form in ("X", "Xd", "Xu", "zeros"):  # the last is what peft has for what is off
        _PARTS[f"glora_{_path}.{_form}"] = (Kind.ELEMENTWISE_GLORA, f"{_path}_{_form}")
        _PARTS[f"glora_{_path}.*.{_form}"] = (Kind.ELEMENTWISE_GLORA, f"{_path}_{_form}")
for _projection in ("to_q", "to_k", "to_v", "to_out.0"):
    for _tensor in ("weight", "bias"):
        _PARTS[f"{_projection}_custom_diffusion.{_tensor}"] = (Kind.CUSTOM, f"{_projection}.{_tensor}")
_ENDS: dict[tuple[Kind | None, str], str] = {(Kind.IA3, "weight"): "weight"}
for _end, _meaning in _PARTS.items():
    _ENDS.setdefault(_meaning, _end)
_PROCESSOR_PARTS = {"down.weight": "down", "up.weight": "up"}  # below a layer called `…_lora`
_WORDS = 3  # the most that a part has


def split_key(key: str) -> Key | None:
    """Take a key of a file of updates apart, or None if it ends in no part of any kind.

    >>> split_key("unet.mid_block.attentions.0.proj_in.lora_A.default.weight")
    Key(layer='unet.mid_block.attentions.0.proj_in', kind=<Kind.LORA: 'LoRA'>, part='down')
    """
    words = key.rsplit(".", _WORDS)
    for start in range(1, len(words)):
        part = ".".join(words[start:])
        layer = ".".join(words[:start])
        if layer.endswith("_lora") and part in _PROCESSOR_PARTS:
            return Key(layer, Kind.LORA, _PROCESSOR_PARTS[part])
        found = _PARTS.get(part) or _PARTS.get(_with_any_adapter(words[start:]))
        if found:
            return Key(layer, *found)
    return None


def key_end(kind: Kind, part: str) -> str:
    """What a key of this part of an update ends in, as kohya and LyCORIS write it, or peft where they have none.

    >>> key_end(Kind.LOHA, "w1_a"), key_end(Kind.LORA, "down")
    ('hada_w1_a', 'lora_down.weight')
    """
    return _ENDS[kind, part]


def _with_any_adapter(words: list[str]) -> str:
    if len(words) < 2:
        return ""
    return ".".join([words[0], "*", *words[2:]])
