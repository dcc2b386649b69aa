"""Scenes of coloured shapes: drawn from captions, read back from pictures, scored."""

from refiners.foundationals.scenes.captions import Request, caption_of, caption_without_places, parse_caption
from refiners.foundationals.scenes.drawing import draw_scenes
from refiners.foundationals.scenes.reader import Reader, ReaderSpec, load_reader, read_scenes
from refiners.foundationals.scenes.scene import Scene, Scenes, Split, Thing, make_scenes
from refiners.foundationals.scenes.scoring import LayoutScores, Score, Scores, score, score_carried, score_layout

__all__ = [
    "LayoutScores",
    "Reader",
    "ReaderSpec",
    "Request",
    "Scene",
    "Scenes",
    "Score",
    "Scores",
    "Split",
    "Thing",
    "caption_of",
    "caption_without_places",
    "draw_scenes",
    "load_reader",
    "make_scenes",
    "parse_caption",
    "read_scenes",
    "score",
    "score_carried",
    "score_layout",
]
