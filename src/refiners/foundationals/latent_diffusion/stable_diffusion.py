"""What all Stable Diffusions share: text encoders, files, copies and LoRAs around a latent diffusion model."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, cast

import torch
from typing_extensions import TypeVar

import refiners.fluxion.layers as fl
from refiners.fluxion.checks import list_of_texts
from refiners.foundationals.clip.double_text_encoder import DoubleTextEncoder
from refiners.foundationals.clip.text_encoder import CLIPTextEncoder
from refiners.foundationals.clip.tokenizer import CLIPTokenizer
from refiners.foundationals.latent_diffusion.autoencoder import LatentDiffusionAutoencoder
from refiners.foundationals.latent_diffusion.copies import copied, twins_of
from refiners.foundationals.latent_diffusion.files import pretrained
from refiners.foundationals.latent_diffusion.generation import TextToImage
from refiners.foundationals.latent_diffusion.lora.loras import Loras
from refiners.foundationals.latent_diffusion.specs import StableDiffusionSpec
from refiners.foundationals.latent_diffusion.unet import UNet
from refiners.solvers import Solver

TextEncoder = TypeVar("TextEncoder", bound=fl.Chain, default=Any)


class StableDiffusion(TextToImage, Generic[TextEncoder]):
    """A Stable Diffusion; `StableDiffusion.from_pretrained` makes one of the class that the files are of.

    unet, lda, clip_text_encoder: None for new ones of the spec's sizes, on `device` and in `dtype`.
    solver: None for DPM-Solver++ with 30 steps.
    spec: None for that of the parts that are given, and of the released model for the others.
    """

    default_spec: ClassVar[StableDiffusionSpec | None] = None

    def __init__(
        self,
        unet: UNet | None = None,
        lda: LatentDiffusionAutoencoder | None = None,
        clip_text_encoder: TextEncoder | None = None,
        solver: Solver | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        spec: StableDiffusionSpec | None = None,
    ) -> None:
        if spec is None:
            if self.default_spec is None:
                raise TypeError(f"{type(self).__name__} has no sizes of its own: give a spec")
            spec = _spec_of_parts(self.default_spec, unet, lda, clip_text_encoder)
        if self.default_spec is not None and not self.default_spec.is_like(spec):
            raise ValueError(f"the spec is no {type(self).__name__}'s: {_advice_for(spec)}")
        super().__init__(spec, unet, lda, solver, device, dtype)
        if clip_text_encoder is None:
            clip_text_encoder = cast(TextEncoder, make_text_encoder(spec, device, dtype))
        self.clip_text_encoder = clip_text_encoder

    @property
    def loras(self) -> Loras:
        """The weight updates (LoRA and its kin) on this model, by name."""
        return Loras(self, self._lora_schedules)

    @classmethod
    def from_pretrained(
        cls,
        where: Path | str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        spec: StableDiffusionSpec | None = None,
    ) -> Self:
        """Load a model whole, or not at all; one that was trained to fill in as the class for that.

        where: a folder in diffusers' layout; a folder of our own files, one for each part; a single `.safetensors` or
            `.ckpt` file, as on Civitai; the name of a repository on the Hugging Face hub, which is fetched once and
            then found in the hub's cache; or "builtin", the small model that comes with the package.
        dtype: None for torch's default, whatever the files hold. An autoencoder that needs float32 is not in float16.
        revision: a branch, tag or commit of a repository.
        spec: the sizes; None takes them from a folder's configuration, and for a single file those of this class.
        Raises ValueError for files that are damaged or of another model, or for a `dtype` that cannot compute,
        FileNotFoundError if there are no files.
        """
        dtype = dtype or torch.get_default_dtype()
        if dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            raise ValueError(f"a model computes in torch.float32, torch.float16 or torch.bfloat16, not in {dtype!r}")
        source = pretrained.find_source(where, revision)
        spec = spec or source.spec(cls.known_specs())
        model = cls.class_for(spec, str(where))(device="meta", spec=spec)
        tensors = source.read(spec, {name: tensor.shape for name, tensor in model.state_dict().items()})
        pretrained.fill(model, spec, tensors, torch.device(device or "cpu"), dtype)
        return model

    @classmethod
    def known_specs(cls) -> list[StableDiffusionSpec]:
        """The sizes of the released models of this class and those below it, then of all others."""
        classes = [*_with_subclasses(cls), *_with_subclasses(StableDiffusion)]
        return [each.default_spec for each in classes if each.default_spec is not None]

    @classmethod
    def class_for(cls, spec: StableDiffusionSpec, where: str = "these sizes") -> type[Self]:
        """This class, or the one of its subclasses that holds models of such sizes.

        Raises ValueError, which starts with `where` and names the class that would, if none does.
        """
        found = _first_holding(spec, cls)
        if found is None:
            raise ValueError(f"{where}: this is no {cls.__name__}: {_advice_for(spec)}")
        return cast(type[Self], found)

    def save_pretrained(self, where: Path | str, dtype: torch.dtype | None = None) -> None:
        """Save the model so that `from_pretrained`, and diffusers, can load it.

        where: a name that ends in `.safetensors` for a single file with the original names, else a folder.
        dtype: of the saved tensors, None for that of the model.
        Adapters are not saved, only the model below them.
        """
        adapted = self.state_dict()
        base = type(self)(device="meta", spec=self.spec).state_dict()
        pretrained.save(where, self.spec, {name: adapted[name] for name in base}, dtype)

    def structural_copy(self) -> Self:
        """The same weights in trees of its own: what adapts one copy does not touch the other.

        All that leads the model leads its copy: adapters, guidances, schedules of LoRAs, MultiDiffusion. Of a guidance
        of your own the copy has the very same object, unless it has a method `copied(twins)`, which is given the
        counterparts of the model's modules in the copy.
        """
        clone = type(self)(
            unet=self.unet.structural_copy(),
            lda=self.lda.structural_copy(),
            clip_text_encoder=self.clip_text_encoder.structural_copy(),
            solver=self.solver.rebuild(self.solver.num_inference_steps),
            spec=self.spec,
        )
        twins = twins_of(self, clone)
        clone.guidances = [copied(guidance, twins) for guidance in self.guidances]
        clone.unet_runner = copied(self.unet_runner, twins)
        clone._lora_schedules = {name: copied(scheduled, twins) for name, scheduled in self._lora_schedules.items()}
        for participant in clone.unet.participants:
            participant.settle(twins)
        return clone


def make_text_encoder(
    spec: StableDiffusionSpec, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> CLIPTextEncoder | DoubleTextEncoder:
    """The one text encoder of a model, or its two side by side, with their tokenizers and new weights."""
    first, *others = (
        CLIPTextEncoder(
            text, CLIPTokenizer(spec.vocabulary, text.max_sequence_length, text.pad_token_id), device, dtype
        )
        for text in spec.text_encoders.values()
    )
    return DoubleTextEncoder(first, others[0]) if others else first


def pair_prompts(text: str | Sequence[str], negative_text: str | Sequence[str]) -> list[str]:
    """As many negative prompts as there are prompts, then the prompts.

    Raises ValueError if there are neither one nor as many negative ones.
    """
    prompts, negatives = list_of_texts(text, "the prompt"), list_of_texts(negative_text, "the negative prompt")
    if len(negatives) == 1:
        negatives *= len(prompts)
    if len(negatives) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts, but {len(negatives)} negative ones: give one, or one for each")
    return [*negatives, *prompts]


def _spec_of_parts(default: StableDiffusionSpec, unet: Any, lda: Any, clip_text_encoder: Any) -> StableDiffusionSpec:
    """The spec with those of the parts that there are."""
    parts = {"unet": unet, "autoencoder": lda}
    if isinstance(clip_text_encoder, fl.Chain):
        for name, path in default.text_encoder_paths.items():
            parts[name] = clip_text_encoder.get_submodule(path)
    specs = {name: part.spec for name, part in parts.items() if isinstance(part, fl.Chain)}
    return replace(default, **specs)


def _first_holding(spec: StableDiffusionSpec, cls: type[StableDiffusion]) -> type[StableDiffusion] | None:
    found = (each for each in _with_subclasses(cls) if each.default_spec and each.default_spec.is_like(spec))
    return next(found, None)


def _advice_for(spec: StableDiffusionSpec) -> str:
    found = _first_holding(spec, StableDiffusion)
    return f"it is a {found.__name__}, so use that" if found else "no class of refiners holds it"


def _with_subclasses(cls: type[StableDiffusion]) -> Iterator[type[StableDiffusion]]:
    yield cls
    for each in cls.__subclasses__():
        yield from _with_subclasses(each)
