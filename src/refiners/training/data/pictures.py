"""Captioned pictures, from a folder or from a data set of the hub.

A folder holds pictures at any depth, and captions in `name.txt` beside `name.png`, or in a file `metadata.jsonl` at its
top with a line `{"file_name": "name.png", "text": "a cat"}` for each. A picture may have another one with it that a
model is to be led by: in a folder of its own, or named in that line as `"conditioning_image": "edges/name.png"`.
"""

import importlib
import io
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
OnBadItem = Literal["stop", "skip"]


class DataError(ValueError):
    """Data that cannot be trained on; the message names it."""


class DataWarning(UserWarning):
    """Data that was left out; the message names it."""


@dataclass(frozen=True)
class Picture:
    """One picture, not yet read.

    caption: None if it has none.
    mask: reads a grey picture of any size; the darker a place, the less it counts. None: all counts.
    conditioning: reads a picture that the model is to be led by, such as the outlines. None: there is none.
    weight: what its loss is multiplied with.
    """

    name: str
    read: Callable[[], bytes]
    caption: str | None = None
    mask: Callable[[], bytes] | None = None
    conditioning: Callable[[], bytes] | None = None
    weight: float = 1.0


def decode(content: bytes, name: str, mode: str = "RGB") -> Image.Image:
    """A picture upright, in a mode; transparent parts are white. Raises DataError if it cannot be read."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
            upright = upright.convert("I").point(lambda value: value * (1 / 257)).convert("L")
        if upright.has_transparency_data:
            upright = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
        return upright.convert(mode)
    except UnidentifiedImageError as error:
        raise DataError(f"{name}: this is no picture in a known format") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{name}: this is no picture that can be read ({error})") from error


def read_folder(
    folder: Path | str,
    on_bad_item: OnBadItem = "stop",
    mask_folder: Path | None = None,
    conditioning_folder: Path | None = None,
) -> list[Picture]:
    """All pictures of a folder, by name, but for those that serve as masks or conditioning pictures.

    on_bad_item: what to do with captions and masks that have no picture: raise DataError, or warn and go on.
    mask_folder: holds masks under the names of the pictures (with any suffix), in the same folders as these or all at
        the top; a picture without one counts as a whole.
    conditioning_folder: holds the conditioning pictures in the same way.
    Raises FileNotFoundError if a folder is not there, DataError if there is no picture, or a caption file is damaged.
    """
    folder = Path(folder)
    masks, conditioning = _files_by_name(mask_folder), _files_by_name(conditioning_folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder of pictures; give one that exists")
    rows = _rows_of_metadata(folder)
    named = {row.name.with_suffix(""): folder / row.conditioning for row in rows if row.conditioning is not None}
    others = {path.resolve() for path in (*masks.values(), *conditioning.values(), *named.values())}
    found = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES]
    files = {path.relative_to(folder): path for path in found if path.resolve() not in others}
    captions = {**_captions_beside(folder), **{row.name: row.text for row in rows}}
    stems = {path.with_suffix(""): path for path in files}
    lost = [str(name) for name in captions if name not in files and name not in stems]
    complain(lost, f"{folder}: {len(lost)} captions have no picture", on_bad_item)
    if not files:
        raise DataError(f"{folder}: there are no pictures in it ({', '.join(SUFFIXES)})")
    names = {name for path in files for name in (path.with_suffix(""), Path(path.stem))}
    for kind, companions in (("masks", masks), ("conditioning pictures", conditioning)):
        strays = [str(path) for name, path in companions.items() if name not in names]
        complain(strays, f"{folder}: {len(strays)} {kind} have no picture", on_bad_item)

    def picture_of(relative: Path, path: Path) -> Picture:
        stem = relative.with_suffix("")
        led_by, mask = named.get(stem, _companion(stem, conditioning)), _companion(stem, masks)
        return Picture(
            name=str(path),
            read=path.read_bytes,
            caption=captions.get(relative, captions.get(stem)),
            mask=None if mask is None else mask.read_bytes,
            conditioning=None if led_by is None else led_by.read_bytes,
        )

    return [picture_of(relative, path) for relative, path in files.items()]


def read_hub(
    repository: str,
    split: str = "train",
    revision: str | None = None,
    image_column: str = "image",
    caption_column: str = "text",
    conditioning_column: str | None = None,
) -> list[Picture]:
    """All pictures of a data set of the hub, or of a local one that `datasets` can read.

    Raises ModuleNotFoundError if `datasets` is not installed, DataError if a column is not there.
    """
    try:
        datasets: Any = importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("a data set of the hub needs `datasets`: pip install datasets") from error
    rows = datasets.load_dataset(repository, split=split, revision=revision)
    image_columns = [column for column in (image_column, conditioning_column) if column is not None]
    for column in (*image_columns, caption_column):
        if column not in rows.column_names:
            raise DataError(f"{repository}: there is no column {column!r}, only {', '.join(rows.column_names)}")
    for column in image_columns:
        rows = rows.cast_column(column, datasets.Image(decode=False))

    captions: list[Any] = list(rows[caption_column])
    for index, caption in enumerate(captions):
        if not isinstance(caption, str | None):
            raise DataError(f"{repository}[{index}]: {caption_column!r} is {caption!r}, but a caption is a text")

    def reader(index: int, column: str) -> Callable[[], bytes]:
        def read() -> bytes:
            image = rows[index][column]
            return cast(bytes, image["bytes"]) if image["bytes"] else Path(image["path"]).read_bytes()

        return read

    return [
        Picture(
            f"{repository}[{index}]",
            reader(index, image_column),
            caption,
            conditioning=None if conditioning_column is None else reader(index, conditioning_column),
        )
        for index, caption in enumerate(captions)
    ]


def with_captions(pictures: Sequence[Picture], on_bad_item: OnBadItem, default: str | None = None) -> list[Picture]:
    """The pictures that have a caption; `default` is given to those that have none, if it is not None.

    Raises DataError if none has one, or one lacks it and `on_bad_item` is "stop".
    """
    if default is not None:
        return [picture if picture.caption is not None else replace(picture, caption=default) for picture in pictures]
    lost = [picture.name for picture in pictures if picture.caption is None]
    if pictures and len(lost) == len(pictures):
        raise DataError(
            f"none of the {len(lost)} pictures has a caption (first: {lost[0]}); write each into a .txt file of its "
            "name, or set dataset.default_caption"
        )
    complain(lost, f"{len(lost)} of {len(pictures)} pictures have no caption", on_bad_item)
    return [picture for picture in pictures if picture.caption is not None]


def complain(names: Sequence[str], what: str, on_bad_item: OnBadItem) -> None:
    """Raise DataError about these, or warn that they are left out; nothing if there are none."""
    if not names:
        return
    listed = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    if on_bad_item == "stop":
        raise DataError(f'{what}: {listed}; mend them, or set dataset.on_bad_item = "skip"')
    warnings.warn(f"{what} and were left out: {listed}", DataWarning, stacklevel=3)


def _captions_beside(folder: Path) -> dict[Path, str]:
    captions: dict[Path, str] = {}
    for path in sorted(folder.rglob("*.txt")):
        captions[path.relative_to(folder).with_suffix("")] = _text_of(path, "this caption").strip()
    return captions


def _text_of(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # some editors put a mark before UTF-8
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: {what} is not UTF-8 text ({error.reason}); save it as UTF-8") from error


def _files_by_name(folder: Path | None) -> dict[Path, Path]:
    if folder is None:
        return {}
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder of pictures; give one that exists")
    found = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES]
    return {path.relative_to(folder).with_suffix(""): path for path in found}


def _companion(stem: Path, companions: dict[Path, Path]) -> Path | None:
    """The one in the same place, or else the one of the same name at the top."""
    return companions.get(stem, companions.get(Path(stem.name)))


class _Row(NamedTuple):
    name: Path
    text: str
    conditioning: Path | None


def _rows_of_metadata(folder: Path) -> list[_Row]:
    path = folder / "metadata.jsonl"
    lines = _text_of(path, "this file").splitlines() if path.exists() else []
    return [_row_of(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]


def _row_of(line: str, where: str) -> _Row:
    try:
        row = cast("dict[str, Any]", json.loads(line))
        conditioning = row.get("conditioning_image")
        if not isinstance(row["text"], str):  # or nothing would become the caption "None"
            raise TypeError("a caption is a text")
        return _Row(Path(row["file_name"]), row["text"], None if conditioning is None else Path(conditioning))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        wanted = '{"file_name": "cat.png", "text": "a cat"}'
        raise DataError(f"{where}: a line should be like {wanted}, not {line!r}") from error
