"""LoRAs at random weights, named by the modules of diffusers' and transformers' models, and what they come to."""

import copy
import functools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusion_specimens import small_folder
from torch import Tensor, nn

from refiners.foundationals.latent_diffusion import StableDiffusion_1
from refiners.weights.files import write_safetensors

TOLERANCE = 1e-5


@dataclass
class Factors:
    """A low-rank update of a module of theirs: `weight + alpha / rank * up · down`."""

    component: str  # "unet" or "text_encoder"
    name: str  # of the module; the text encoder's with the `text_model.` of earlier releases
    down: Tensor
    up: Tensor
    alpha: float | None  # None: not in the file, so that it is the rank

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def delta(self) -> Tensor:
        """The update of the weight, worked out in double precision."""
        product = self.up.double().flatten(1) @ self.down.double().flatten(1)
        strength = 1.0 if self.alpha is None else self.alpha / self.rank
        return strength * product.reshape(self.up.shape[0], *self.down.shape[1:])


def modules(pipeline: Any) -> Iterator[tuple[str, str, Any]]:
    """All layers that a LoRA can go to: component, name, module."""
    for component in ("unet", "text_encoder"):
        for name, module in getattr(pipeline, component).named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and "lora_" not in name:
                full = f"text_model.{name}" if component == "text_encoder" else name
                yield component, full, module


def random_factors(
    pipeline: Any,
    wanted: Callable[[str, str], bool] = lambda component, name: True,
    rank: int | None = None,
    alpha: float | None = None,
    has_alphas: bool = True,
) -> list[Factors]:
    """For every wanted layer an update, about as strong as the layer; if not given, ranks and alphas differ."""
    generator = torch.Generator().manual_seed(5)
    found: list[Factors] = []
    for component, name, module in modules(pipeline):
        if not wanted(component, name):
            continue
        own_rank = rank or 1 + len(found) % 5
        out, *inner = module.weight.shape
        down = torch.randn(own_rank, *inner, generator=generator)
        up = torch.randn(out, own_rank, *[1] * (len(inner) - 1), generator=generator)
        down *= 0.3 * module.weight.norm() / (up.flatten(1) @ down.flatten(1)).norm()
        own_alpha = (alpha or 0.5 + len(found) % 7) if has_alphas else None
        found.append(Factors(component, name, down, up, own_alpha))
    return found


def merge(pipeline: Any, factors: list[Factors], scale: float = 1.0) -> None:
    """Add the updates to the weights of their model."""
    layers = {(component, name): module for component, name, module in modules(pipeline)}
    for update in factors:
        weight = layers[update.component, update.name].weight
        with torch.no_grad():
            weight.copy_(weight.double() + scale * update.delta().reshape(weight.shape))


def outputs(sd15: Any) -> tuple[Tensor, Tensor]:
    """Of our UNet and text encoder, for the inputs of `their_outputs`."""
    latents, text, ids = _inputs(sd15.unet.spec.text_dim)
    with torch.no_grad():
        sd15.unet.set_timestep(torch.tensor([5, 700]))
        sd15.unet.set_clip_text_embedding(text)
        return sd15.unet(latents), sd15.clip_text_encoder(ids)


def their_outputs(pipeline: Any) -> tuple[Tensor, Tensor]:
    latents, text, ids = _inputs(pipeline.unet.config.cross_attention_dim)
    with torch.no_grad():
        prediction = pipeline.unet(latents, torch.tensor([5, 700]), text).sample
        return prediction, pipeline.text_encoder(ids).last_hidden_state


def _inputs(text_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 10, generator=generator)
    ids = torch.randint(0, 49000, (2, 9), generator=generator)
    return latents, torch.randn(2, 7, text_dim, generator=generator), ids


def assert_same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], tolerance: float = TOLERANCE) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        error = ((mine - other).norm() / other.norm()).item()
        assert error <= tolerance, f"relative error {error:.2e}"


def assert_changed(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], which: str = "both") -> None:
    """The comparison means something only if the LoRA does something."""
    for name, old, new in zip(("unet", "text_encoder"), before, after, strict=True):
        if which in ("both", name):
            assert ((new - old).norm() / old.norm()).item() > 1e-2, name


Models = tuple[Any, Any]


@functools.cache
def _folder() -> Any:
    """It lives as long as the tests do: peft looks at the files of the base."""
    return tempfile.TemporaryDirectory()


@functools.cache
def _loaded() -> Models:
    path = small_folder(Path(_folder().name) / "sd")
    return StableDiffusion_1.from_pretrained(path), StableDiffusionPipeline.from_pretrained(path)


def load_both() -> Models:
    """Our model and diffusers' pipeline: their UNets and text encoders are equal, and both to be changed at will."""
    ours, theirs = _loaded()
    trees = {name: copy.deepcopy(getattr(ours, name)) for name in ("unet", "clip_text_encoder")}
    parts = {name: copy.deepcopy(getattr(theirs, name)) for name in ("unet", "text_encoder")}
    return SimpleNamespace(**trees), StableDiffusionPipeline(**{**theirs.components, **parts})


def load_ours() -> StableDiffusion_1:
    """Our model as it was loaded, not to be changed."""
    return _loaded()[0]


def kohya_tensors(factors: list[Factors]) -> dict[str, Tensor]:
    """As sd-scripts names them: underscores for dots, and a prefix for each model."""
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
    tensors: dict[str, Tensor] = {}
    for update in factors:
        name = prefixes[update.component] + update.name.replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": update.down, f"{name}.lora_up.weight": update.up}
        if update.alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(update.alpha)
    return tensors


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    write_safetensors(path, tensors, metadata)
    return path
