"""The places of a model that updates go to, and every way in which files spell them."""

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

_PEFT_PREFIX = "base_model.model."  # peft wraps a model twice
_MAX_SPELLING = 150  # characters; longer ones name no layer of any model, and comparing takes their square

# In the first attention-processor files of diffusers, the projections of one attention had these names.
_PROCESSOR_NAMES = {
    ".to_q": ".processor.to_q_lora",
    ".to_k": ".processor.to_k_lora",
    ".to_v": ".processor.to_v_lora",
    ".to_out.0": ".processor.to_out_lora",
    ".q_proj": ".to_q_lora",
    ".k_proj": ".to_k_lora",
    ".v_proj": ".to_v_lora",
    ".out_proj": ".to_out_lora",
}


@dataclass(frozen=True)
class Component:
    """A part of a pipeline, as the text encoder, and what files put before the names of its layers.

    dotted, flat: before names with dots, and before those with underscores in their place. The first of each is what we
        write.
    hidden: what peft's names lack, as the module that it stands for is gone from the newest releases.
    kohya_names: which of the names of a place kohya's files have: the first, or the second, which is the original one.
    """

    name: str
    dotted: tuple[str, ...]
    flat: tuple[str, ...]
    hidden: str = ""
    kohya_names: int = 0


UNET = Component(
    "unet",
    dotted=("unet.", "lora_unet.", "diffusion_model.", "model.diffusion_model.", ""),
    flat=("lora_unet_", "lycoris_", "oft_unet_"),  # the last in kohya's own OFT
)
CLIP_TEXT_ENCODER = Component(
    "clip_text_encoder",
    dotted=(
        *("text_encoder.", "lora_te.", "lora_te1.", "clip_l."),
        *("text_encoders.clip_l.transformer.", "cond_stage_model.transformer.", ""),
    ),
    flat=("lora_te_", "lora_te1_", "lycoris_"),
    hidden="text_model.",
)
# Of Stable Diffusion XL, in whose text encoders the same names come twice, so that none stands without a prefix.
XL_UNET = replace(UNET, kohya_names=1)
XL_TEXT_ENCODER = Component(
    "clip_text_encoder",
    dotted=(
        *("text_encoder.", "lora_te1.", "clip_l.", "text_encoders.clip_l.transformer."),
        "conditioner.embedders.0.transformer.",
    ),
    flat=("lora_te1_",),
    hidden="text_model.",
)
XL_TEXT_ENCODER_2 = Component(
    "clip_text_encoder_2",
    dotted=("text_encoder_2.", "lora_te2.", "clip_g.", "text_encoders.clip_g.transformer."),
    flat=("lora_te2_",),
    hidden="text_model.",
)


@dataclass(frozen=True)
class Place:
    """A layer that updates can go to.

    path: ours, from the component on: `unet.MiddleBlock.….Linear_1`.
    layer: "linear", "convolution", or what else it is, in words.
    shape: of its weight.
    names: what others call it, without the component; the first is diffusers' or transformers', the second the
        original one.
    has_bias: whether it has one besides its weight.
    """

    component: Component
    path: str
    layer: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    has_bias: bool = False

    @property
    def dotted_name(self) -> str:
        """As diffusers writes it, with the component."""
        return f"{self.component.dotted[0]}{self.names[0]}"

    @property
    def flat_name(self) -> str:
        """As kohya writes it, with the component."""
        return f"{self.component.flat[0]}{self.names[self.component.kohya_names].replace('.', '_')}"

    @property
    def peft_name(self) -> str:
        """As peft writes it, without the component."""
        return f"{_PEFT_PREFIX}{self.names[0].removeprefix(self.component.hidden)}"

    def spellings(self) -> Iterator[str]:
        """Every name with dots, without the component."""
        for name in self.names:
            yield name
            for ending, older in _PROCESSOR_NAMES.items():
                if name.endswith(ending):
                    yield name.removesuffix(ending) + older


class Places:
    """The places of a model, found by the name of a layer in any format."""

    def __init__(self, places: Iterable[Place]) -> None:
        self.all = tuple(places)
        components = {place.component.name: place.component for place in self.all}
        self._tables: list[tuple[str, dict[str, Place]]] = []
        for component in components.values():
            dotted = _table(place for place in self.all if place.component == component)
            flat = {name.replace(".", "_"): place for name, place in dotted.items()}
            self._tables += [(prefix, flat) for prefix in component.flat]
            self._tables += [(prefix, dotted) for prefix in component.dotted]
        self._tables.sort(key=lambda table: -len(table[0]))  # the empty prefix is tried last

    def find(self, name: str) -> Place | None:
        """The place that a file calls `name`, or None."""
        name = name.removeprefix(_PEFT_PREFIX)
        for prefix, table in self._tables:
            if name.startswith(prefix):
                place = table.get(name[len(prefix) :].removeprefix(_PEFT_PREFIX))
                if place is not None:
                    return place
        return None

    def nearest(self, name: str) -> str | None:
        """The known name that comes nearest to an unknown one, with its prefix; None if nothing is like it."""
        name = name.removeprefix(_PEFT_PREFIX)
        for prefix, table in self._tables:
            if table and name.startswith(prefix) and len(name) <= _MAX_SPELLING:
                found = self._nearest_in(prefix, name[len(prefix) :].removeprefix(_PEFT_PREFIX))
                return None if found is None else prefix + found
        return None

    def _nearest_in(self, prefix: str, name: str) -> str | None:
        """The nearest pattern first, as `down_blocks.#.proj`, then of its names that with the nearest numbers."""
        patterns = self._patterns[prefix]
        found = difflib.get_close_matches(re.sub(r"\d+", "#", name), patterns, n=1, cutoff=0.6)
        return difflib.get_close_matches(name, patterns[found[0]], n=1, cutoff=0.0)[0] if found else None

    @cached_property
    def _patterns(self) -> dict[str, dict[str, list[str]]]:
        found: dict[str, dict[str, list[str]]] = {}
        for prefix, table in self._tables:
            patterns = found.setdefault(prefix, {})
            for name in table:
                patterns.setdefault(re.sub(r"\d+", "#", name), []).append(name)
        return found


def _table(places: Iterable[Place]) -> dict[str, Place]:
    table: dict[str, Place] = {}
    for place in places:
        for name in place.spellings():
            assert table.setdefault(name, place) is place, f"{name} names both {table[name].path} and {place.path}"
    return table
