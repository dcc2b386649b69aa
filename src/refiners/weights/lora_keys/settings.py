"""What peft's settings say of each layer's alpha: in an `adapter_config.json`, or in the header of diffusers' files.

The strength of an update is alpha / rank, or alpha / sqrt(rank) in rank-stabilised LoRA (arXiv 2312.03732).
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

METADATA_KEY = "lora_adapter_metadata"  # where diffusers keeps peft's settings in a safetensors header

# With these, the base was changed before training: the two factors alone are not what was learned.
_CHANGES_BASE = re.compile(r"pissa|olora|corda|loftq", re.IGNORECASE)
_LARGEST = 3e38  # alphas are saved in single precision
_LITERAL = re.compile(r"\^?[\w.]+")


@dataclass(frozen=True)
class Settings:
    """The settings of one adapter.

    alphas: of single layers, by pattern: the end of a layer's name, from a dot on, or with `^` its whole name.
    """

    alpha: float
    alphas: Mapping[str, float]
    is_rank_stabilised: bool = False

    def alpha_of(self, name: str, rank: int) -> float:
        """The alpha for alpha / rank; name: of the layer, with dots, as in the model."""
        alpha = self._matching(name)
        return alpha * math.sqrt(rank) if self.is_rank_stabilised else alpha

    def _matching(self, name: str) -> float:
        if not self.alphas:
            return self.alpha
        words = name.split(".")
        ends = {f"^{name}", *(".".join(words[start:]) for start in range(len(words)))}
        matching = ends.intersection(self.alphas)
        if len(matching) <= 1:
            return self.alphas[matching.pop()] if matching else self.alpha
        return next(alpha for pattern, alpha in self.alphas.items() if pattern in matching)  # the first counts


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
        if values.get("lora_alpha") is not None
    }


def _settings(where: str, values: dict[str, object]) -> Settings:
    start = values.get("init_lora_weights")
    if isinstance(start, str) and _CHANGES_BASE.search(start):
        raise ValueError(
            f"{where}: this LoRA was started by {start!r:.80}, which changes the base model too; "
            "convert it to a plain LoRA with peft (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    alphas: dict[str, float] = {}
    for pattern, alpha in _object(where, "alpha_pattern", values.get("alpha_pattern") or {}).items():
        plain = pattern.replace("\\.", ".").removesuffix("$")
        if not _LITERAL.fullmatch(plain):
            raise ValueError(
                f"{where}: alpha_pattern has the regular expression {pattern!r:.80}; "
                "expressions of a file are not run: write out the names of its layers"
            )
        alphas.setdefault(plain, _number(where, "alpha_pattern", alpha))
    return Settings(
        alpha=_number(where, "lora_alpha", values["lora_alpha"]),
        alphas=alphas,
        is_rank_stabilised=_boolean(where, "use_rslora", values.get("use_rslora")),
    )


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
