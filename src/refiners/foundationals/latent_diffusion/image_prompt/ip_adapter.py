"""IP-Adapter (arXiv 2308.06721): pictures as prompts, besides the text.

    ip_adapter = IPAdapter(sd15.unet, clip_image_encoder=encoder, weights="ip-adapter_sd15.safetensors").inject()
    ip_adapter.set_clip_image_embedding(ip_adapter.compute_clip_image_embedding(image))

Image embeddings are (2 P, T, text_dim): T tokens for each of P pictures of a batch, those of no image prompt first.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

import torch
from PIL import Image
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.adapters.adapter import Adapter
from refiners.adapters.delta import Scale, checked_scale
from refiners.fluxion.checks import instance_of, list_of_numbers
from refiners.fluxion.context import Contexts, placed
from refiners.foundationals.clip.image_encoder import CLIPImageEncoder
from refiners.foundationals.latent_diffusion.image_prompt.attention import DecoupledAttention
from refiners.foundationals.latent_diffusion.image_prompt.cross_attentions import CrossAttention, find_cross_attentions
from refiners.foundationals.latent_diffusion.image_prompt.masks import masks_to_tensor
from refiners.foundationals.latent_diffusion.image_prompt.projection import new_projection, sees_grid
from refiners.foundationals.latent_diffusion.image_prompt.weights import (
    Weights,
    fill,
    named_tensors,
    projection_for,
    read_ip_adapter,
)
from refiners.foundationals.latent_diffusion.lora.blocks import Blocks, block_factors
from refiners.foundationals.latent_diffusion.lora.loras import Schedule
from refiners.foundationals.latent_diffusion.participant import Participant
from refiners.foundationals.latent_diffusion.unet import HasUNet, UNet, unet_of
from refiners.weights.files import write_safetensors


class IPAdapter(fl.Chain, Participant):
    """Lets a UNet read pictures. Injected, it is a child of the UNet, and adds an attention to each one over the text.

    target: a UNet, or a model with one.
    clip_image_encoder: any chain from pictures to what `image_proj` takes. It is used, and not taken into the tree;
        None if embeddings are computed elsewhere.
    image_proj: from what the encoder gives to tokens, (B, T, text_dim). None for that of the weights, or a new one.
    scale: how strong the pictures are; 0 is off. See `set_scale`.
    fine_grained: of a new one: whether it sees the grid of patches, as a "plus" IP-Adapter, or one vector.
    weights: a file with its authors' names, or such tensors; None for a new projection, and keys and values as the
        text's, to be trained.

    Raises ValueError, which names them, for weights that do not fit.
    """

    is_adapter = True  # its tensors are none of the base's

    _tokens: Tensor | None
    _masks: Tensor | None

    def __init__(
        self,
        target: UNet | HasUNet,
        clip_image_encoder: fl.Chain | None = None,
        image_proj: fl.Chain | None = None,
        scale: Scale | Schedule = 1.0,
        fine_grained: bool = False,
        weights: Weights | None = None,
    ) -> None:
        unet = unet_of(target)
        text_dim = unet.spec.text_dim
        self._target = [unet]  # in lists: no children
        self._clip_image_encoder = [clip_image_encoder]
        tensors, where = (None, "") if weights is None else read_ip_adapter(weights, text_dim)
        with placed("meta" if tensors else unet.device, unet.dtype):
            if image_proj is None and tensors:
                image_proj = projection_for(tensors, where)
            image_proj = image_proj or new_projection(clip_image_encoder, text_dim, fine_grained)
            super().__init__(fl.Return(), image_proj)
            self._places = [_adapted(attention, text_dim) for attention in find_cross_attentions(unet)]
        self._fill(tensors, where)
        self.register_buffer("_tokens", None, persistent=False)
        self.register_buffer("_masks", None, persistent=False)
        self.set_scale(scale)

    def _fill(self, tensors: Mapping[str, Tensor] | None, where: str) -> None:
        device, dtype = self.target.device, self.target.dtype
        if tensors:
            fill(self.image_proj, self.attentions, tensors, device, dtype, where)
            return
        self.to(device, dtype)
        for attention, adapter in self._places:
            adapter.image_attention.start_from_text(attention.layer)

    # -- the edit

    @property
    def target(self) -> UNet:
        """The UNet."""
        return cast(UNet, self.parent or self._target[0])

    def inject(self) -> Self:
        """Put this adapter into the UNet, whole or not at all. Raises RuntimeError if it is in there already."""
        if self.parent is not None:
            raise RuntimeError(f"this IPAdapter is injected already, at {self.get_path()}: eject it first")
        with fl.transaction():
            self.target.append(self)
            for attention, adapter in self._places:
                adapter.image_attention.context = self._context
                adapter.inject(attention.layer)
        return self

    def eject(self) -> None:
        """Take this adapter out of the UNet again. Raises RuntimeError if it is not in there."""
        if self.parent is None:
            raise RuntimeError("this IPAdapter is not injected, so it cannot be ejected")
        target, places = self.target, self._injected()
        with fl.transaction():
            for _, adapter in places:
                adapter.eject()
            target.remove(self)
        self._target, self._places = [target], places

    @property
    def attentions(self) -> list[DecoupledAttention]:
        """The attentions to the tokens, in diffusers' order of the cross-attentions."""
        return [adapter for _, adapter in self._injected()]

    def _injected(self) -> list[tuple[CrossAttention, DecoupledAttention]]:
        """The attentions and where they are; read off the tree, which may be a copy of the one that was adapted."""
        if self.parent is None:
            return self._places
        return [
            (attention, adapter)
            for attention in find_cross_attentions(self.target)
            for adapter, _ in attention.layer.walk(DecoupledAttention, recurse=True)
            if adapter.image_attention.context == self._context
        ]

    # -- the image prompt

    @property
    def image_proj(self) -> fl.Chain:
        """From what the image encoder gives to tokens."""
        return self.layer(-1, fl.Chain)

    @property
    def clip_image_encoder(self) -> fl.Chain:
        """From pictures to what `image_proj` takes. Raises ValueError if there is none."""
        encoder = self._clip_image_encoder[0]
        if encoder is None:
            raise ValueError("this IPAdapter has no image encoder: make it with one, as clip_image_encoder=")
        return encoder

    def compute_clip_image_embedding(
        self, image: Any, weights: Sequence[float] | None = None, concat_batches: bool = True
    ) -> Tensor:
        """Encode one picture or several as an image prompt: (2, T, text_dim), no image prompt first.

        image: what the image encoder takes: for CLIP's a picture, a list of them, or pixels (B, 3, S, S).
        weights: how much each picture counts, 1 where nothing is said.
        concat_batches: several pictures are one prompt, with the tokens of all; otherwise they are one prompt for each
            picture of a batch, (2 B, T, text_dim).
        """
        encoder, blank = self.clip_image_encoder, None
        if isinstance(encoder, CLIPImageEncoder) and sees_grid(self.image_proj):
            size = encoder.spec.image_size
            encoder = encoder.grid_features()
            blank = encoder(torch.zeros(1, 3, size, size))
        return self.embed_features(encoder(image), weights, concat_batches, blank)

    def embed_features(
        self,
        features: Tensor,
        weights: Sequence[float] | None = None,
        concat_batches: bool = True,
        blank: Tensor | None = None,
    ) -> Tensor:
        """As `compute_clip_image_embedding`, from what the image encoder gave for B pictures.

        blank: what stands for no picture, of batch 1; None for zeros.
        """
        projection = self.image_proj.structural_copy()  # by itself, so that its contexts are none of the UNet's
        features = features.to(projection.device, projection.dtype)
        blank = torch.zeros_like(features[:1]) if blank is None else blank.to(features)
        positive, negative = projection(features), projection(blank).expand(len(features), -1, -1)
        if weights is not None:
            factors = list_of_numbers(weights, "the weights of pictures", len(features))
            positive = positive * positive.new_tensor(factors)[:, None, None]
        if concat_batches:
            positive, negative = positive.flatten(0, 1)[None], negative.flatten(0, 1)[None]
        return torch.cat([negative, positive])

    def set_clip_image_embedding(self, image_embedding: Tensor) -> None:
        """Set the image prompt, which stays until another is set.

        image_embedding: (2 P, T, text_dim) as `compute_clip_image_embedding` gives it, for P pictures, or one for all.
            A UNet that is called by itself, without its model, takes any number of rows that divides its batch.
        """
        unet = self.target
        instance_of(image_embedding, Tensor, "the image embedding", "what compute_clip_image_embedding returns")
        if image_embedding.ndim != 3 or image_embedding.shape[-1] != unet.spec.text_dim:
            raise ValueError(
                f"an image embedding for this UNet is (2, T, {unet.spec.text_dim}), but this one is "
                f"{tuple(image_embedding.shape)}: make it with compute_clip_image_embedding"
            )
        self._buffers["_tokens"] = image_embedding.to(unet.device, unet.dtype)

    def set_masks(
        self, masks: Image.Image | Sequence[Image.Image] | None, scales: Sequence[float] | None = None
    ) -> None:
        """Say where each picture of the image prompt counts: where its mask is white, half or more.

        masks: one for each picture, of one size and any mode (turned into grey), stretched over what is made; None for
            everywhere. A single one is for a lone picture, or for all.
        scales: how strong each picture is, besides the scale of all.
        """
        tensor = None if masks is None else masks_to_tensor(masks, scales).to(self.target.device)
        self._buffers["_masks"] = tensor

    @property
    def clip_image_embedding(self) -> Tensor:
        """The image prompt. Raises ValueError if there is none, or it does not divide among the masks."""
        if self._tokens is None:
            raise ValueError("an IPAdapter must be given an image prompt: call set_clip_image_embedding first")
        tokens, masks = self._tokens.shape[1], 1 if self._masks is None else self._masks.shape[1]
        if tokens % masks:
            raise ValueError(
                f"{masks} masks, but the {tokens} tokens of the image prompt are not those of as many pictures: give "
                "one mask for each"
            )
        return self._tokens

    # -- the scale

    @property
    def scale(self) -> float | tuple[float, ...]:
        """How strong the image prompt is now, where the blocks say nothing else: a number, or one for each picture."""
        return self._scale

    @scale.setter
    def scale(self, value: Scale | Schedule) -> None:
        self._set_scale(value, self._factors)

    def set_scale(self, scale: Scale | Schedule, blocks: Blocks | None = None) -> None:
        """Set how strong the image prompt is. What was compiled stays good.

        scale: a number; one for each picture of a batch; or a function of the step, 0 … count - 1, and the count.
        blocks: what the scale is multiplied with in parts of the UNet, as for LoRAs:
            `{"down_blocks": 0, "mid_block": 0, "up_blocks": 0, "up_blocks.0.attentions.1": 1}` takes the style alone,
            as InstantStyle (arXiv 2404.02733) does in Stable Diffusion XL.
        Raises ValueError if a block fits no attention, or a scale is not finite, TypeError if it is no number.
        """
        self._set_scale(scale, block_factors([attention.place for attention, _ in self._injected()], blocks))

    def _set_scale(self, scale: Scale | Schedule, factors: Sequence[float]) -> None:
        self._apply_scale(scale(0, 1) if callable(scale) else scale, factors)
        self._schedule = scale if callable(scale) else None
        self._factors = factors

    def _apply_scale(self, scale: Scale, factors: Sequence[float]) -> None:
        checked = checked_scale(scale)
        for adapter, factor in zip(self.attentions, factors, strict=True):
            scaled = [value * factor for value in checked] if isinstance(checked, tuple) else checked * factor
            adapter.image_attention.scaling.scale = scaled
        self._scale = checked

    def before_step(self, index: int, count: int) -> None:
        """Set the scale for a step, if it depends on it."""
        if self._schedule is not None:
            self._apply_scale(self._schedule(index, count), self._factors)

    # -- what the UNet is told

    def init_context(self) -> Contexts:
        return {self._context: {"tokens": self.clip_image_embedding, "masks": self._masks}}

    @property
    def conditions(self) -> dict[str, Tensor]:
        """The image prompt as a condition of the UNet, by "context.key"."""
        return {f"{self._context}.tokens": self.clip_image_embedding}

    @property
    def spatial_conditions(self) -> dict[str, Tensor]:
        """The masks, (1, P, H, W), which cover the picture that is made, by "context.key"."""
        return {} if self._masks is None else {f"{self._context}.masks": self._masks}

    @property
    def _context(self) -> str:
        """The slot in the UNet: another one for each IP-Adapter."""
        return self.ensure_parent.slot_of(self)

    # -- the tensors

    def own_parameters(self) -> Iterator[nn.Parameter]:
        """What is trained: the projection, and in the UNet the keys and values of the tokens."""
        yield from self.image_proj.parameters()
        for adapter in self.attentions:
            yield from adapter.image_attention.parameters()

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by the names in files of IP-Adapters."""
        return named_tensors(self.image_proj, self.attentions)

    def save(self, path: Path | str) -> None:
        """Write a safetensors file that this class, diffusers and others load."""
        write_safetensors(path, self.tensors())


def _adapted(attention: CrossAttention, text_dim: int) -> tuple[CrossAttention, DecoupledAttention]:
    occupant = attention.layer.layer("ScaledDotProductAttention")
    layer = cast(fl.ScaledDotProductAttention, occupant.base if isinstance(occupant, Adapter) else occupant)
    return attention, DecoupledAttention(layer, text_dim, attention.layer.inner_dim)
