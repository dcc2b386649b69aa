"""What peft's settings say of each layer: in an `adapter_config.json`, or in the header of diffusers' files.

The strength of an update is alpha / rank, or alpha / sqrt(rank) in rank-stabilised LoRA (arXiv 2312.03732).
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar, cast

METADATA_KEY = "lora_adapter_metadata"  # where diffusers keeps peft's settings in a safetensors header

CAYLEY_TERMS = 5  # what peft takes of the series in OFT if nothing else is said

# With these, the base was changed before training: the two factors alone are not what was learned.
_CHANGES_BASE = re.compile(r"pissa|olora|corda|loftq|lora_ga", re.IGNORECASE)
_LARGEST = 3e38  # alphas are saved in single precision
_MOST_TERMS = 100
_LITERAL = re.compile(r"\^?[\w.]+")

Value = TypeVar("Value", float, float | None)


@dataclass(frozen=True)
class Settings:
    """The settings of one adapter.

    alphas, ranks: of single layers, by pattern: the end of a layer's name, from a dot on, or with `^` its whole name.
    rank: of a LoKr, which alone needs it; else 0.
    cayley_terms: of the series that OFT has for a turn; 0 if it is worked out exactly.
    turn_limit: of the norm of all turns of an OFT together, which peft keeps them to whenever it runs ("COFT"); None
        for none.
    peft_type: what peft calls this kind of adapter; None where the settings are not peft's.
    first_rank: of an AdaLoRA, whose layers began with this rank and keep its strength; else 0.
    on_inputs: ends of the names of layers whose inputs an (IA)^3 scales.
    has_biases: whether biases of the model were trained as well.
    """

    alpha: float | None
    alphas: Mapping[str, float]
    is_rank_stabilised: bool = False
    rank: float = 0.0
    ranks: Mapping[str, float] = field(default_factory=dict[str, float])
    cayley_terms: int = CAYLEY_TERMS
    turn_limit: float | None = None
    peft_type: str | None = None
    first_rank: float = 0.0
    on_inputs: tuple[str, ...] = ()
    has_biases: bool = False

    def alpha_of(self, name: str, rank: int | float) -> float:
        """The alpha for alpha / rank, the rank if none is said; name: of the layer, with dots, as in the model."""
        if self.first_rank:  # arXiv 2303.10512; the small number is peft's
            return (self.alpha if self.alpha and self.alpha > 0 else self.first_rank) / (self.first_rank + 1e-5) * rank
        alpha = _matching(name, self.alphas, self.alpha)
        if alpha is None:
            return float(rank)
        return alpha * math.sqrt(rank) if self.is_rank_stabilised else alpha

    def rank_of(self, name: str) -> float:
        """The rank that a layer was given, which the tensors of a LoKr need not have; 0 if none is said."""
        return _matching(name, self.ranks, self.rank)


def parse_settings(where: str, text: str) -> dict[str, Settings]:
    """Read settings by what they are prefixed with: "unet", "text_encoder", or "" if they are of the only adapter.

    where: for error messages. Raises ValueError if the text is not JSON of this form.
    """
    try:
        content: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error}); get the file again, or save it anew") from error
    groups: dict[str, dict[str, object]] = {}
    for key, value in _object(where, "the whole", content).items():
        prefix, _, setting = key.rpartition(".")
        groups.setdefault(prefix, {})[setting] = value
    return {
        prefix: _settings(f"{where}, {prefix:.80}" if prefix else where, values)
        for prefix, values in groups.items()
        if any(values.get(name) is not None for name in ("peft_type", "lora_alpha"))
    }


def _settings(where: str, values: dict[str, object]) -> Settings:
    start = values.get("init_lora_weights")
    if isinstance(start, str) and _CHANGES_BASE.search(start):
        raise ValueError(
            f"{where}: this LoRA was started by {start!r:.80}, which changes the base model too; "
            "convert it to a plain LoRA with peft (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    if values.get("alora_invocation_tokens"):
        raise ValueError(f"{where}: this is an activated LoRA, which works from some tokens of a text on, and not here")
    name = "lora_alpha" if "lora_alpha" in values else "alpha"  # LoHa and LoKr have the shorter one
    alpha = values.get(name)
    with_rank = values if values.get("peft_type") == "LOKR" else {}
    return Settings(
        alpha=None if alpha is None else _number(where, name, alpha),
        alphas=_pattern(where, "alpha_pattern", values),
        is_rank_stabilised=_boolean(where, "use_rslora", values.get("use_rslora")),
        rank=_number(where, "r", with_rank.get("r", 0)),
        ranks=_pattern(where, "rank_pattern", with_rank),
        cayley_terms=_cayley_terms(where, values),
        turn_limit=_number(where, "eps", values.get("eps")) if _boolean(where, "coft", values.get("coft")) else None,
        peft_type=_text(where, "peft_type", values.get("peft_type")),
        first_rank=_first_rank(where, values),
        on_inputs=_on_inputs(where, values.get("feedforward_modules")),
        has_biases=_text(where, "bias", values.get("bias")) not in (None, "none"),
    )


def _first_rank(where: str, values: dict[str, object]) -> float:
    if values.get("peft_type") != "ADALORA":
        return 0.0
    rank = _number(where, "init_r", values.get("init_r"))
    if rank < 1:
        raise ValueError(f"{where}: init_r should be at least 1, but it is {rank:g}")
    return rank


def _on_inputs(where: str, value: object) -> tuple[str, ...]:
    names = cast("list[object]", value) if isinstance(value, list) else [] if value is None else [None]
    found = tuple(name for name in names if isinstance(name, str))
    if len(found) < len(names):
        raise ValueError(f"{where}: feedforward_modules should be a list of names, but it is {value!r:.80}")
    return found


def _text(where: str, name: str, value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: {name} should be a text, but it is {value!r:.80}")
    return value


def _cayley_terms(where: str, values: dict[str, object]) -> int:
    is_exact = values.get("use_cayley_neumann") is False
    terms = _number(where, "num_cayley_neumann_terms", values.get("num_cayley_neumann_terms") or CAYLEY_TERMS)
    if not 1 <= terms <= _MOST_TERMS:
        raise ValueError(f"{where}: num_cayley_neumann_terms should be from 1 to {_MOST_TERMS}, but it is {terms:g}")
    return 0 if is_exact else int(terms)


def _pattern(where: str, setting: str, values: dict[str, object]) -> dict[str, float]:
    found: dict[str, float] = {}
    for pattern, value in _object(where, setting, values.get(setting) or {}).items():
        plain = pattern.replace("\\.", ".").removesuffix("$")
        if not _LITERAL.fullmatch(plain):
            raise ValueError(
                f"{where}: {setting} has the regular expression {pattern!r:.80}; "
                "expressions of a file are not run: write out the names of its layers"
            )
        found.setdefault(plain, _number(where, setting, value))
    return found


def _matching(name: str, patterns: Mapping[str, float], otherwise: Value) -> float | Value:
    if not patterns:
        return otherwise
    words = name.split(".")
    ends = {f"^{name}", *(".".join(words[start:]) for start in range(len(words)))}
    matching = ends.intersection(patterns)
    if len(matching) <= 1:
        return patterns[matching.pop()] if matching else otherwise
    return next(value for pattern, value in patterns.items() if pattern in matching)  # the first counts


def _object(where: str, name: str, value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {name} should map names to values, but it is {value!r:.80}")
    return cast("dict[str, object]", value)


def _number(where: str, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
        raise ValueError(f"{where}: {name} should be a finite number, but it is {value!r:.80}")
    return float(value)


def _boolean(where: str, name: str, value: object) -> bool:
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{where}: {name} should be true or false, but it is {value!r:.80}")
    return bool(value)
