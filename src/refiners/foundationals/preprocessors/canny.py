"""Edges by Canny's method ("A Computational Approach to Edge Detection", 1986), as OpenCV computes them."""

import numpy as np
from PIL import Image

from refiners.fluxion.checks import picture


def canny_edges(image: Image.Image, low_threshold: float = 100, high_threshold: float = 200) -> Image.Image:
    """White edges on black, of mode L and the picture's size.

    high_threshold: how steep a brightness has to be, of 0 … about 1000, for an edge to begin.
    low_threshold: how steep it has to stay for the edge to go on.
    Raises ImportError without OpenCV, ValueError if the thresholds are not 0 <= low <= high, TypeError for no picture.
    """
    pixels = np.array(picture(image).convert("RGB"))
    if not 0 <= low_threshold <= high_threshold:
        raise ValueError(f"thresholds {low_threshold} and {high_threshold} should be at least 0, the low one first")
    try:
        import cv2
    except ImportError as error:
        raise ImportError("canny_edges needs OpenCV: pip install 'refiners[preprocessors]'") from error
    return Image.fromarray(np.asarray(cv2.Canny(pixels, low_threshold, high_threshold)))
