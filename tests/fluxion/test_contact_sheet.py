"""Contact sheets: each pixel of each picture is there, and where it should be."""

import numpy as np
import pytest
from PIL import Image

from refiners.fluxion.contact_sheet import GAP, contact_sheet


def noise(width: int, height: int, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_pictures_of_many_sizes_lie_in_rows_and_columns() -> None:
    rows = [[noise(5, 4, 0), noise(3, 6, 1)], [noise(7, 2, 2)]]
    sheet = np.asarray(contact_sheet(rows, scale=2))
    assert sheet.shape == (12 + GAP + 4, 14 + GAP + 6, 3)
    for x, y, image in ((0, 0, rows[0][0]), (14 + GAP, 0, rows[0][1]), (0, 12 + GAP, rows[1][0])):
        part = sheet[y : y + 2 * image.height, x : x + 2 * image.width]
        assert np.array_equal(part, np.asarray(image).repeat(2, axis=0).repeat(2, axis=1))
        sheet = sheet.copy()
        sheet[y : y + 2 * image.height, x : x + 2 * image.width] = 255
    assert (sheet == 255).all()  # white where no picture is


def test_words_stand_left_of_rows_and_above_columns() -> None:
    image = noise(32, 32, 0)
    plain = np.asarray(contact_sheet([[image], [image]], scale=3))
    sheet = np.asarray(contact_sheet([[image], [image]], ["without", "with it"], ["a red circle on white"], scale=3))
    top, left = sheet.shape[0] - plain.shape[0], sheet.shape[1] - plain.shape[1]
    assert np.array_equal(sheet[top:, left:], plain)
    assert (sheet[:top, left:] < 255).any()
    for start in (top, top + 96 + GAP):  # beside each of the rows
        assert (sheet[start : start + 96, :left] < 255).any()
    assert (sheet[:top, :left] == 255).all()


def test_pictures_of_any_mode_are_shown() -> None:
    image = noise(4, 4, 0)
    sheet = contact_sheet([[image.convert(mode) for mode in ("RGB", "L", "RGBA", "1", "P")]], scale=1)
    assert sheet.mode == "RGB" and sheet.size == (5 * 4 + 4 * GAP, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": []}, r"the rows have \[\]"),
        ({"rows": [[noise(1, 1, 0)], []]}, r"the rows have \[1, 0\]"),
        ({"rows": [[noise(1, 1, 0)]], "titles": ["a", "b"]}, "2 titles for 1 rows"),
        ({"rows": [[noise(1, 1, 0)] * 3], "headings": ["a"]}, "1 headings for 3 columns"),
        ({"rows": [[noise(1, 1, 0)]], "scale": 0}, "a scale of 0"),
    ],
)
def test_what_makes_no_sheet_is_told(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        contact_sheet(**arguments)  # pyright: ignore[reportArgumentType]
