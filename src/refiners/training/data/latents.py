"""Batches for latent diffusion: latents, text, noise, time steps; a sample follows from its place in training alone."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from refiners.fluxion.utils import image_to_tensor
from refiners.training.data.buckets import BucketSampler, Size, choose_size, fit, sample_seed
from refiners.training.data.cache import TensorCache, key_of
from refiners.training.data.captions import CaptionRule
from refiners.training.data.pictures import DataError, OnBadItem, Picture, complain, decode
from refiners.training.losses import draw_noise

Encode = Callable[[Tensor], Tensor]  # pictures (1, 3, H, W) in [-1, 1] to latents (1, C, h, w)
EncodeText = Callable[[str], Tensor]  # a text to its embedding (L, D)


@dataclass(frozen=True)
class Conditioning:
    """How a picture that a model is led by becomes what the model is given.

    prepare: of one picture, which is as large as that of its sample; kept in the cache.
    mark: what tells apart ways to prepare it, part of the key.
    is_its_own: whether a picture that comes without another one is led by itself; else that is an error.
    """

    prepare: Callable[[Image.Image], Tensor]
    mark: str
    is_its_own: bool = False


@dataclass(frozen=True)
class DiffusionBatch:
    """B samples.

    latents, noise: (B, C, h, w).  timesteps: (B,), whole.  weights: (B,), what each sample's loss is multiplied with.
    masks: (B, 1, h, w), 0 … 1, or None if all counts.
    embeddings: (B, L, D), or None if the texts are to be encoded in training.
    conditioning: (B, …), what the model is led by besides, or None if there is nothing.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    weights: Tensor
    texts: list[str]
    masks: Tensor | None = None
    embeddings: Tensor | None = None
    conditioning: Tensor | None = None

    def to(self, device: torch.device) -> "DiffusionBatch":
        """The same batch on a device."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        moved = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **moved)


@dataclass(frozen=True)
class SampleRule:
    """How a sample is drawn: the range of timesteps, from `first` up to, but without, `end`, and the rest.

    conditioning_drop_probability: how often what the model is led by is all zeros.
    """

    seed: int
    end_timestep: int = 1000
    first_timestep: int = 0
    offset_noise: float = 0.0
    flip_probability: float = 0.0
    conditioning_drop_probability: float = 0.0
    captions: CaptionRule = field(default_factory=CaptionRule)


@dataclass(frozen=True)
class Item:
    """A picture as "latents" (C, h, w), flipped or not, its "mask" (1, h, w) and its "conditioning" if it has them."""

    name: str
    key: str
    size: Size
    caption: str
    weight: float
    read: Callable[[bool], dict[str, Tensor]]


class LatentCache:
    """Turns pictures into items; latents are worked out once and kept in `cache`.

    encoder: what tells apart autoencoders, part of the key.
    has_flips: whether mirrored latents are kept as well.
    conditioning: None leaves conditioning pictures unread.
    """

    def __init__(
        self,
        cache: TensorCache,
        encode: Encode,
        encoder: str,
        sizes: Sequence[Size],
        factor: int,
        has_flips: bool,
        conditioning: Conditioning | None = None,
    ) -> None:
        self.cache, self.encode, self.encoder = cache, encode, encoder
        self.sizes, self.factor, self.has_flips = sizes, factor, has_flips
        self.conditioning = conditioning

    def items(
        self, pictures: Sequence[Picture], on_bad_item: OnBadItem, on_progress: Callable[[int, int], None] | None = None
    ) -> list[Item]:
        """An item for each picture that can be read.

        Raises DataError if one cannot be read and `on_bad_item` is "stop", or none can.
        """
        items: list[Item] = []
        broken: list[str] = []
        for number, picture in enumerate(pictures, start=1):
            try:
                items.append(self._item(picture))
            except DataError as error:
                if on_bad_item == "stop":
                    raise DataError(f'{error}; mend it, or set dataset.on_bad_item = "skip"') from error
                broken.append(picture.name)
            if on_progress is not None:
                on_progress(number, len(pictures))
        complain(broken, f"{len(broken)} of {len(pictures)} pictures cannot be read", "skip")
        if not items:
            raise DataError(f"none of the {len(pictures)} pictures can be read")
        return items

    def fill(self, pictures: Sequence[Picture]) -> None:
        """Put latents into the cache; pictures that cannot be read are passed over."""
        for picture in pictures:
            with suppress(DataError):
                self._item(picture)

    def _item(self, picture: Picture) -> Item:
        mask = _content(picture.mask, f"the mask of {picture.name}") if picture.mask else b""
        parts = [_content(picture.read, picture.name), mask, self.encoder, repr(self.sizes), self.factor]
        if self.conditioning is not None:
            parts += [self.conditioning.mark, _content(*self._led_by(picture, self.conditioning))]
        key = key_of(*parts)

        def read(is_flipped: bool) -> dict[str, Tensor]:
            return self.cache.get(f"{key}{'f' if is_flipped else ''}", lambda: self._encode(picture, is_flipped))

        height, width = read(False)["latents"].shape[1:]
        if self.has_flips:
            read(True)
        size = (width * self.factor, height * self.factor)
        return Item(picture.name, key, size, picture.caption or "", picture.weight, read)

    def _encode(self, picture: Picture, is_flipped: bool) -> dict[str, Tensor]:
        image = decode(picture.read(), picture.name)
        size = choose_size(image.size, self.sizes)
        tensors = {"latents": self.encode(_pixels(fit(image, size), is_flipped) * 2 - 1)[0].float()}
        if picture.mask is not None:
            mask = decode(picture.mask(), f"the mask of {picture.name}", mode="L").resize(image.size)
            counted = _pixels(fit(mask, size), is_flipped)
            tensors["mask"] = functional.avg_pool2d(counted, self.factor)[0]
        if self.conditioning is not None:
            read, name = self._led_by(picture, self.conditioning)
            led_by = fit(decode(read(), name).resize(image.size), size)
            tensors["conditioning"] = self.conditioning.prepare(_flipped(led_by) if is_flipped else led_by)
        return tensors

    def _led_by(self, picture: Picture, conditioning: Conditioning) -> tuple[Callable[[], bytes], str]:
        """Reads the picture that a model is led by, and what to call it."""
        if picture.conditioning is not None:
            return picture.conditioning, f"the conditioning picture of {picture.name}"
        if conditioning.is_its_own:
            return picture.read, picture.name
        raise DataError(
            f"{picture.name}: there is no conditioning picture with it; put one of the same name into "
            "dataset.conditioning_folder, or name a column of the data set as dataset.conditioning_column"
        )


class LatentBatches:
    """Batches of items, by place.

    encode_text: embeds a text, from a cache; None if texts are encoded in training.
    """

    def __init__(
        self, items: Sequence[Item], batch_size: int, rule: SampleRule, encode_text: EncodeText | None
    ) -> None:
        self.items, self.rule, self.encode_text = items, rule, encode_text
        self.batch_size = batch_size
        self.sampler = BucketSampler([item.size for item in items], batch_size, rule.seed)
        marks = [f"{item.key} {item.caption} {item.weight}" for item in items]
        self.fingerprint = key_of(*marks)
        self.contents = [f"{key_of(mark)[:16]} {item.name}" for mark, item in zip(marks, items, strict=True)]

    def __len__(self) -> int:
        return len(self.sampler)

    def get(self, epoch: int, index: int, rank: int, count: int) -> DiffusionBatch:
        """A batch, or the part of one of `count` processes, of which its size is a multiple."""
        share = self.batch_size // count
        places = range(rank * share, (rank + 1) * share)
        chosen = self.sampler.batch(epoch, index)
        samples = [self._sample(self.items[chosen[place]], epoch, index, place) for place in places]
        return _collate(samples)

    def _sample(self, item: Item, epoch: int, index: int, place: int) -> dict[str, Any]:
        rule = self.rule
        generator = torch.Generator().manual_seed(sample_seed(rule.seed, epoch, index, place))
        is_flipped = torch.rand((), generator=generator).item() < rule.flip_probability
        text = rule.captions.choose(item.caption, generator)
        timestep = torch.randint(rule.first_timestep, rule.end_timestep, (), generator=generator)
        tensors = item.read(is_flipped)
        sample: dict[str, Any] = {
            "latents": tensors["latents"],
            "noise": draw_noise(tensors["latents"].shape, rule.offset_noise, generator),
            "timesteps": timestep,
            "weights": torch.tensor(item.weight),
            "texts": text,
            "masks": tensors.get("mask"),
        }
        if "conditioning" in tensors:
            is_kept = torch.rand((), generator=generator).item() >= rule.conditioning_drop_probability
            sample["conditioning"] = tensors["conditioning"] * is_kept
        if self.encode_text is not None:
            sample["embeddings"] = self.encode_text(text)
        return sample


def _collate(samples: Sequence[dict[str, Any]]) -> DiffusionBatch:
    columns = {name: [sample[name] for sample in samples] for name in samples[0]}
    masks = columns.pop("masks")
    if any(mask is not None for mask in masks):
        whole = torch.ones(1, *columns["latents"][0].shape[1:])
        columns["masks"] = [whole if mask is None else mask for mask in masks]
    texts: list[str] = columns.pop("texts")
    return DiffusionBatch(**{name: torch.stack(values) for name, values in columns.items()}, texts=texts)


def _content(read: Callable[[], bytes], name: str) -> bytes:
    try:
        return read()
    except OSError as error:
        raise DataError(f"{name}: it cannot be read ({error})") from error


def _pixels(image: Image.Image, is_flipped: bool) -> Tensor:
    return image_to_tensor(_flipped(image) if is_flipped else image)


def _flipped(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
