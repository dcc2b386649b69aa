"""Where the layers of a diffusion model sit, and what LoRA files call them."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import Any, Protocol, cast

from torch import nn

from refiners.adapters.adapter import Adapter
from refiners.adapters.delta import Delta
from refiners.adapters.delta_adapter import DeltaAdapter
from refiners.fluxion.layers.chain import Chain
from refiners.foundationals.clip import names as clip_names
from refiners.foundationals.clip.double_text_encoder import ENCODER_PATHS, DoubleTextEncoder
from refiners.foundationals.clip.text_encoder import CLIPTextEncoder, CLIPTextSpec
from refiners.foundationals.latent_diffusion import unet_names
from refiners.foundationals.latent_diffusion.unet import UNet
from refiners.foundationals.latent_diffusion.unet_spec import UNetSpec
from refiners.weights.formats import Family
from refiners.weights.lora_keys import (
    CLIP_TEXT_ENCODER,
    UNET,
    XL_TEXT_ENCODER,
    XL_TEXT_ENCODER_2,
    XL_UNET,
    Component,
    Place,
    Places,
)
from refiners.weights.rules import Names


class Patchable(Protocol):
    """What a LoRA file can go onto: any object with these two trees."""

    @property
    def unet(self) -> UNet:
        """The tree that `unet` keys go to."""
        ...

    @property
    def clip_text_encoder(self) -> Chain:
        """The tree that `text_encoder` keys go to, or one with two such trees."""
        ...


@dataclass(frozen=True)
class Layer:
    """A layer as it sits in the tree now: under the adapters that are on it, in `parent`."""

    place: Place
    module: nn.Module
    parent: Chain


class Layers(dict[str, Layer]):
    """Layers by their path from the model on."""

    @cached_property
    def places(self) -> Places:
        """Their places, to be found by what files call them."""
        return Places(layer.place for layer in self.values())


def find_layers(model: Patchable) -> Layers:
    """The layers with a weight, by their path from the model on, in the order of the trees.

    Raises TypeError if the model has no UNet and CLIP text encoder of ours.
    """
    _check(model)
    unet, is_xl = model.unet, family_of(model) is Family.SDXL
    found = list(_layers(XL_UNET if is_xl else UNET, "unet", unet, _unet_names(unet.spec)))
    for component, path, encoder in _text_encoders(model.clip_text_encoder):
        found += _layers(component, path, encoder, _text_names(encoder.spec))
    return Layers({layer.place.path: layer for layer in found})


def family_of(model: Patchable) -> Family | None:
    """Which LoRAs go onto a model; None for one of unusual sizes."""
    return model.unet.spec.family


def _text_encoders(tree: Chain) -> Iterator[tuple[Component, str, CLIPTextEncoder]]:
    """Each text encoder, with its path from the model on."""
    if isinstance(tree, CLIPTextEncoder):
        yield XL_TEXT_ENCODER_2 if tree.spec.projection_dim else CLIP_TEXT_ENCODER, "clip_text_encoder", tree
        return
    components = (XL_TEXT_ENCODER, XL_TEXT_ENCODER_2)
    for component, path, encoder in zip(components, ENCODER_PATHS, tree.layers(CLIPTextEncoder), strict=True):
        yield component, f"clip_text_encoder.{path}", encoder


def find_deltas(model: Patchable, layers: dict[str, Layer]) -> Iterator[tuple[Layer | None, Delta]]:
    """Every update on the trees of a model, with the layer that it is on; None if that is a layer of an adapter."""
    by_module = {id(layer.module): layer for layer in layers.values()}
    for tree in (model.unet, model.clip_text_encoder):
        for adapter, _ in tree.walk(DeltaAdapter, recurse=True):
            yield from ((by_module.get(id(adapter.base)), delta) for delta in adapter.deltas.values())


def _check(model: object) -> None:
    for name, kinds in (("unet", (UNet,)), ("clip_text_encoder", (CLIPTextEncoder, DoubleTextEncoder))):
        part = getattr(model, name, None)
        if not isinstance(part, kinds):
            found = "none" if part is None else f"a {type(part).__name__}"
            wanted = " or ".join(f"a {kind.__name__}" for kind in kinds)
            raise TypeError(
                f"a LoRA goes onto a model with {wanted} as `{name}`, but this {type(model).__name__} has {found}: "
                "pass the whole model, such as a StableDiffusion_1"
            )


@cache
def _unet_names(spec: UNetSpec) -> tuple[Names, ...]:
    return unet_names.diffusers_names(spec), unet_names.single_file_names(spec)


@cache
def _text_names(spec: CLIPTextSpec) -> tuple[Names, ...]:
    return tuple(clip_names.text_encoder_names(spec, prefix) for prefix in (clip_names.TRANSFORMERS_PREFIX, ""))


def _layers(component: Component, above: str, tree: Chain, names: tuple[Names, ...]) -> Iterator[Layer]:
    parents = {id(module): parent for module, parent in tree.walk(_is_weighted)}
    modules = cast("Iterator[tuple[str, nn.Module]]", tree.named_modules())
    for path, module in modules:
        if isinstance(module, Adapter) or id(module) not in parents:
            continue
        theirs = [name for name in (_their_name(path, rules) for rules in names) if name]
        if theirs:
            shape = tuple(cast(Any, module).weight.shape)
            has_bias = module._parameters.get("bias") is not None
            place = Place(component, f"{above}.{path}", _kind(module), shape, tuple(theirs), has_bias)
            yield Layer(place, module, parents[id(module)])


def _is_weighted(module: nn.Module, parent: Any) -> bool:
    return module._parameters.get("weight") is not None


@lru_cache(maxsize=10_000)  # to work the names of a model out takes longer than to put a small LoRA on it
def _their_name(path: str, rules: Names) -> str | None:
    """None for a layer that was added to the tree, as by an adapter."""
    _, name = rules.find(f"{path}.weight", is_to_theirs=True)
    return name and name.removesuffix(".weight")


def _kind(module: nn.Module) -> str:
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Conv2d):
        return "convolution" if module.groups == 1 else "grouped convolution"
    return "embedding" if isinstance(module, nn.Embedding) else "norm"
