"""Edges: where they are, what the thresholds do, and what is refused."""

import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw

from refiners.foundationals.preprocessors import canny_edges


def picture() -> Image.Image:
    image = Image.new("RGB", (40, 32), "white")
    ImageDraw.Draw(image).rectangle((10, 8, 29, 23), fill=(200, 30, 30))
    return image


def test_edges_are_white_lines_along_the_sides_of_things() -> None:
    edges = canny_edges(picture())
    assert edges.mode == "L" and edges.size == (40, 32)
    values = np.asarray(edges)
    assert set(np.unique(values)) == {0, 255}
    rows, columns = np.nonzero(values)
    assert {int(row) for row in rows} <= set(range(7, 25)) and {int(column) for column in columns} <= set(range(9, 31))
    assert (values[9:23, 11:28] == 0).all() and (values[:, 8:12] == 255).any(axis=1).sum() >= 14


def test_thresholds_leave_out_what_is_faint() -> None:
    faint = Image.new("L", (32, 32), 120)
    ImageDraw.Draw(faint).rectangle((8, 8, 20, 20), fill=130)
    assert np.asarray(canny_edges(faint)).max() == 0
    assert np.asarray(canny_edges(faint, 5, 20)).max() == 255


def test_thresholds_in_the_wrong_order_and_a_missing_opencv_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="thresholds 200 and 100"):
        canny_edges(picture(), 200, 100)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match=r"pip install 'refiners\[preprocessors\]'"):
        canny_edges(picture())
