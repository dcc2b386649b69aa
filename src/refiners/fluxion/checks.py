"""What a user hands over, checked where it comes in: Python would trip over it later, and say what it tripped over."""

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar, cast

from PIL import Image
from torch import Tensor

T = TypeVar("T")


def whole_number(value: Any, name: str) -> int:
    """The value as an int, if it is one: Python's, numpy's or a tensor's. Raises TypeError if not."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} should be a whole number, but it is {described(value)}") from None


def real_number(value: Any, name: str) -> float:
    """The value as a float, if it is a number. Raises TypeError if not, ValueError if it is not finite."""
    is_number = isinstance(value, Tensor) or hasattr(value, "__float__")
    if not is_number or (isinstance(value, Tensor) and value.numel() != 1):
        raise TypeError(f"{name} should be a number, but it is {described(value)}")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{name} should be a finite number, but it is {number}")
    return number


def instance_of(value: Any, kind: type[T], name: str, advice: str) -> T:
    """The value, if it is of a class. Raises TypeError, with what to give instead, if not."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {described(value)}: give {advice}")
    return value


def picture(value: Any, name: str = "the picture") -> Image.Image:
    """The value, if it is a picture of PIL's. Raises TypeError if not."""
    return instance_of(value, Image.Image, name, "a PIL image, such as PIL.Image.open(path) or Image.fromarray(array)")


def in_eight_bits(image: Image.Image) -> Image.Image:
    """A picture of 16 bits, as of depths, in 8, of mode L; others as they are. Raises ValueError if it has floats."""
    if image.mode == "F":
        raise ValueError(
            "the picture has floats, which Pillow cuts off at 0 and 255: turn them into whole numbers first"
        )
    if image.mode.startswith("I;16"):  # which Pillow would cut off at 255
        return image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    return image


def list_of_pictures(value: Any, name: str = "the picture") -> list[Image.Image]:
    """A picture, or several, as a list, see `in_eight_bits`.

    Raises TypeError for what is no picture, ValueError if there is none, or if it has floats.
    """
    is_one = not isinstance(value, Sequence) or isinstance(value, str | bytes)
    listed: list[Any] = [value] if is_one else [*cast("Sequence[Any]", value)]
    if not listed:
        raise ValueError(f"{name} should be a picture, or several, but there are none")
    if len(listed) == 1:
        return [in_eight_bits(picture(listed[0], name))]
    names = [f"{name}, number {index} of {len(listed)}," for index in range(len(listed))]
    return [in_eight_bits(picture(*each)) for each in zip(listed, names, strict=True)]


def list_of_numbers(value: Any, name: str, count: int) -> list[float]:
    """Numbers as a list. Raises TypeError for what is no number, ValueError if they are not `count`, or not finite."""
    if not isinstance(value, Iterable):
        raise TypeError(f"{name} should be {count} numbers, one for each, but it is {described(value)}")
    listed = list(cast("Iterable[Any]", value))
    if len(listed) != count:
        raise ValueError(f"{name} should be {count} numbers, one for each, but there are {len(listed)}: {listed!r:.60}")
    return [real_number(each, f"{name}, number {index} of {count},") for index, each in enumerate(listed)]


def height_and_width(value: Any) -> tuple[int, int]:
    """A size of a picture, in pixels. Raises TypeError if it is not two whole numbers."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(cast("Sequence[Any]", value)) != 2:
        raise TypeError(f"a size is height and width in pixels, such as (512, 768), but this is {described(value)}")
    height, width = (whole_number(side, "a side of the size") for side in cast("Sequence[Any]", value))
    return height, width


def list_of_texts(value: Any, name: str) -> list[str]:
    """A text, or several, as a list. Raises TypeError for what is no text."""
    texts: Any = [value] if isinstance(value, str) else value
    if not isinstance(texts, Iterable):
        raise TypeError(f"{name} should be a text, or a list of texts, but it is {described(texts)}")
    listed = list(cast("Iterable[Any]", texts))
    return [
        instance_of(each, str, f"{name}, number {index} of {len(listed)},", "a text")
        for index, each in enumerate(listed)
    ]


def described(value: Any) -> str:
    """What a message says of a value that is of the wrong type."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if type(value) in (str, bytes, bool, int, float, list, tuple, dict, set):
        text = repr(value)
        return f"the {type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
    return f"a {type(value).__name__}"
