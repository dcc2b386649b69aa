"""What stands as the caption of a sample: the picture's own, a trigger phrase, or nothing."""

from dataclasses import dataclass
from typing import cast

import torch


@dataclass(frozen=True)
class CaptionRule:
    """How captions are varied.

    trigger_phrase: put before each caption; "" for none.
    trigger_only_probability: how often the trigger phrase stands alone, 0 … 1.
    drop_probability: how often there is no text at all, for classifier-free guidance (arXiv 2207.12598), 0 … 1.
    templates: texts with a place `{}` for the caption, one of which is chosen each time.
    """

    trigger_phrase: str = ""
    trigger_only_probability: float = 0.0
    drop_probability: float = 0.0
    templates: tuple[str, ...] = ("{}",)

    def choose(self, caption: str, generator: torch.Generator) -> str:
        """The text for one sample. Always draws as much, so that what is drawn next does not depend on it."""
        numbers = cast("list[float]", torch.rand(3, generator=generator, dtype=torch.float64).tolist())
        drop, trigger_only, template = numbers
        if drop < self.drop_probability:
            return ""
        if self.trigger_phrase and trigger_only < self.trigger_only_probability:
            return self.trigger_phrase
        return self._filled(self.templates[int(template * len(self.templates))], caption)

    def all_for(self, caption: str) -> set[str]:
        """Every text that `choose` can give."""
        texts = {self._filled(template, caption) for template in self.templates}
        if self.trigger_phrase and self.trigger_only_probability:
            texts.add(self.trigger_phrase)
        if self.drop_probability:
            texts.add("")
        return texts

    def _filled(self, template: str, caption: str) -> str:
        return ", ".join(part for part in (self.trigger_phrase, template.replace("{}", caption)) if part)
