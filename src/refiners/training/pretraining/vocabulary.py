"""Writes the vocabulary of the embedded model: the part of CLIP's that the words below need, in CLIP's own form.

Each of the words is cut into the same pieces as by the whole vocabulary; other words come out in smaller pieces.
"""

from itertools import pairwise
from pathlib import Path

from refiners.foundationals.clip.tokenizer import VOCABULARY_PATH, WORD_END
from refiners.foundationals.scenes.captions import PARTS, SYNONYMS
from refiners.foundationals.scenes.scene import BACKGROUNDS, COLORS, FILLS, SHAPES

# Words that no caption has: for adapters to teach, or simply likely in prompts.
FREE_WORDS = (
    "sks ohwx dotted checkered outlined gradient shaded glowing pixel neon cartoon sketch style moon flower house tree "
    "cat dog fish car boat face smile arrow cloud leaf crown spiral hexagon pentagon oval small large big tiny thing "
    "object shape picture photo drawing painting image with without two three four one middle center small next beside "
    "between inside under near it is there of no nothing empty"
)


def scene_words() -> list[str]:
    """Every word that captions of scenes have, and the free words."""
    texts = [*SHAPES, *COLORS, *FILLS, *BACKGROUNDS, *PARTS, "a an and on in at the corner background", FREE_WORDS]
    texts += [word for words in SYNONYMS.values() for word in words]
    return sorted({word for text in texts for word in text.split()})


def write_vocabulary(path: Path, source: Path = VOCABULARY_PATH) -> None:
    """Write the merges of `source` that the words need, in their order there."""
    version, *lines = source.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    ranks = {(left, right): rank for rank, (left, right) in enumerate(map(str.split, lines))}
    used = {rank for word in scene_words() for rank in _merges_of(word, ranks)}
    path.write_text("\n".join([version, *(lines[rank] for rank in sorted(used))]) + "\n", encoding="utf-8")


def _merges_of(word: str, ranks: dict[tuple[str, str], int]) -> list[int]:
    """The merges that join the letters of a word, the first of the vocabulary first."""
    pieces, used = [*word[:-1], word[-1] + WORD_END], list[int]()
    while True:
        possible = [(ranks[pair], index) for index, pair in enumerate(pairwise(pieces)) if pair in ranks]
        if not possible:
            return used
        rank, index = min(possible)
        used.append(rank)
        pieces[index : index + 2] = [pieces[index] + pieces[index + 1]]
