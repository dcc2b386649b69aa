"""Aspect-ratio buckets: pictures of like shape are brought to one size, so that they can share a batch."""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import TypeVar, cast

import torch
from PIL import Image

from refiners.training.randomness import generator_for, mix

Size = tuple[int, int]  # width, height
T = TypeVar("T")


def bucket_sizes(resolution: int, multiple: int, max_ratio: float) -> list[Size]:
    """Sizes of at most resolution² pixels, sides in multiples of `multiple`, from 1 : max_ratio to max_ratio : 1.

    >>> bucket_sizes(512, 64, 1.5)
    [(448, 576), (512, 512), (576, 448)]
    """
    square = max(multiple, resolution // multiple * multiple)
    sizes = {(square, square)}
    for short in range(multiple, square + 1, multiple):
        long = max(short, resolution**2 // short // multiple * multiple)
        if long / short <= max_ratio:
            sizes |= {(short, long), (long, short)}
    return sorted(sizes)


def choose_size(size: Size, sizes: Sequence[Size]) -> Size:
    """The bucket whose aspect ratio is nearest to that of a picture."""
    ratio = math.log(size[0] / size[1])
    return min(sizes, key=lambda each: abs(math.log(each[0] / each[1]) - ratio))


def fit(image: Image.Image, size: Size) -> Image.Image:
    """Scale a picture until it covers `size`, then cut off what stands over, evenly on both sides."""
    scale = max(size[0] / image.width, size[1] / image.height)
    width, height = max(size[0], round(image.width * scale)), max(size[1], round(image.height * scale))
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    scaled = image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)
    return scaled.crop((left, top, left + size[0], top + size[1]))


class BucketSampler:
    """Which items make up a batch. In an epoch each item comes at least once; a batch is of one bucket.

    Where a bucket does not fill its last batch, some of its items come a second time.
    """

    def __init__(self, buckets: Sequence[Hashable], batch_size: int, seed: int) -> None:
        self.batch_size = batch_size
        self.seed = seed
        self._members: dict[Hashable, list[int]] = defaultdict(list)
        for index, bucket in enumerate(buckets):
            self._members[bucket].append(index)
        self._length = sum(math.ceil(len(members) / batch_size) for members in self._members.values())
        self._planned: tuple[int, list[list[int]]] = (-1, [])

    def __len__(self) -> int:
        return self._length

    def batch(self, epoch: int, index: int) -> list[int]:
        """The items of a batch."""
        if self._planned[0] != epoch:
            self._planned = (epoch, self._plan(epoch))
        return self._planned[1][index]

    def _plan(self, epoch: int) -> list[list[int]]:
        generator = generator_for(self.seed, "order", epoch)
        batches: list[list[int]] = []
        for members in self._members.values():
            order = shuffled(members, generator)
            count = math.ceil(len(order) / self.batch_size)
            filled = [order[place % len(order)] for place in range(count * self.batch_size)]
            batches += [filled[start : start + self.batch_size] for start in range(0, len(filled), self.batch_size)]
        return shuffled(batches, generator)


def shuffled(values: Sequence[T], generator: torch.Generator) -> list[T]:
    """The values in a random order."""
    order = cast("list[int]", torch.randperm(len(values), generator=generator).tolist())
    return [values[place] for place in order]


def sample_seed(seed: int, epoch: int, index: int, place: int) -> int:
    """The seed of all that is drawn for the sample at a place of a batch."""
    return mix(seed, "sample", epoch, index, place)
