"""Pictures side by side, enlarged so that their pixels can be seen, with words beside and above."""

import textwrap
from collections.abc import Sequence
from itertools import accumulate, zip_longest
from math import ceil

from PIL import Image, ImageDraw

GAP = 6  # between pictures, in pixels
FONT_SIZE = 13
LETTER_WIDTH = 7  # about, in pixels
LEAST_LETTERS = 16  # of a line


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    titles: Sequence[str] = (),
    headings: Sequence[str] = (),
    scale: int = 4,
) -> Image.Image:
    """Lay out rows of pictures on white; each of their pixels becomes a square, `scale` pixels wide.

    rows: pictures of any size and mode. A column is as wide as what is widest in it, a row as high.
    titles: one for each row, on its left; none by default.  headings: one for each column, above it; none by default.
    Raises ValueError if a row is empty, if there are other numbers of titles or headings, or a scale below 1.

    >>> dot = Image.new("RGB", (8, 8), "red")
    >>> contact_sheet([[dot, dot]], scale=4).size
    (70, 32)
    """
    _check(rows, titles, headings, scale)
    enlarged = [[_enlarged(image, scale) for image in row] for row in rows]
    columns = [[image for image in column if image is not None] for column in zip_longest(*enlarged)]
    widths = [max(image.width for image in column) for column in columns]
    heights = [max(image.height for image in row) for row in enlarged]
    beside = [textwrap.fill(title, LEAST_LETTERS) for title in titles]
    above = [
        textwrap.fill(text, max(LEAST_LETTERS, width // LETTER_WIDTH))
        for text, width in zip(headings, widths, strict=False)
    ]
    widths = [max(pair) for pair in zip_longest(widths, (_size(text)[0] for text in above), fillvalue=0)]
    heights = [max(pair) for pair in zip_longest(heights, (_size(text)[1] for text in beside), fillvalue=0)]
    left = max((_size(text)[0] + GAP for text in beside), default=0)
    top = max((_size(text)[1] + GAP for text in above), default=0)
    xs = [*accumulate([width + GAP for width in widths], initial=left)]
    ys = [*accumulate([height + GAP for height in heights], initial=top)]

    sheet = Image.new("RGB", (xs[-1] - GAP, ys[-1] - GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for x, text in zip(xs, above, strict=False):
        pen.multiline_text((x, 0), text, fill="black", font_size=FONT_SIZE)
    for y, text in zip(ys, beside, strict=False):
        pen.multiline_text((0, y), text, fill="black", font_size=FONT_SIZE)
    for y, row in zip(ys, enlarged, strict=False):
        for x, image in zip(xs, row, strict=False):
            sheet.paste(image, (x, y))
    return sheet


def _check(rows: Sequence[Sequence[Image.Image]], titles: Sequence[str], headings: Sequence[str], scale: int) -> None:
    if not rows or not all(rows):
        raise ValueError(f"a contact sheet needs pictures in each row, but the rows have {[len(row) for row in rows]}")
    columns = max(len(row) for row in rows)
    if titles and len(titles) != len(rows):
        raise ValueError(f"{len(titles)} titles for {len(rows)} rows of pictures: give one for each row, or none")
    if headings and len(headings) != columns:
        raise ValueError(f"{len(headings)} headings for {columns} columns of pictures: give one for each, or none")
    if scale < 1:
        raise ValueError(f"a scale of {scale} leaves nothing of the pictures: it should be 1 or more")


def _enlarged(image: Image.Image, scale: int) -> Image.Image:
    return image.convert("RGB").resize((scale * image.width, scale * image.height), Image.Resampling.NEAREST)


def _size(text: str) -> tuple[int, int]:
    """Of a text in pixels."""
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    _, _, right, bottom = pen.multiline_textbbox((0, 0), text, font_size=FONT_SIZE)
    return ceil(right), ceil(bottom)
