"""CLIP's tokenizer: text to token ids, by byte-pair encoding of lower-cased text (arXiv 2103.00020, section 2.4).

A vocabulary is a text file: a line `#version: …`, then one merge a line, first come first served. The ids follow from
it: 256 bytes, 256 bytes that end a word, what each merge gives, the start and the end of a text.
"""

import functools
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

import torch
from torch import Tensor

import refiners.fluxion.layers as fl

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VOCABULARY_PATH = Path(__file__).parent / "bpe_simple_vocab_16e6.txt"
START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
# A contraction's tail, a run of letters, one digit, or a run of anything else that is not blank.
_WORD = rf"{re.escape(START)}|{re.escape(END)}|'(?:s|t|re|ve|m|ll|d)|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+"


class TruncationWarning(UserWarning):
    """A text had more tokens than fit: its end was cut off and has no effect."""


class Piece(NamedTuple):
    """Token ids that stay together, and where in the text they begin."""

    token_ids: tuple[int, ...]
    start: int


class CLIPTokenizer(fl.Module):
    """A text, or several, to token ids (B, sequence_length): start, text, end, padding. Ids as a tensor pass through.

    Warns (`TruncationWarning`) when the end of a text does not fit; `overflow` tells which part.

    vocabulary_path: a vocabulary in the form of CLIP's own, read when it is first used, once per process.
    pad_token_id: what fills up short sequences; None for the end of text. Stable Diffusion XL's second encoder takes 0.
    new_tokens: words beyond the vocabulary, in any case of letters, and the ids that each stands for.
    """

    def __init__(
        self,
        vocabulary_path: Path | str = VOCABULARY_PATH,
        sequence_length: int = 77,
        pad_token_id: int | None = None,
        new_tokens: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        if sequence_length < 3:
            raise ValueError(f"sequence_length={sequence_length} must be at least 3: start, one token and end")
        self.vocabulary_path = str(vocabulary_path)
        self.sequence_length = sequence_length
        self._pad_token_id = pad_token_id
        longest_first = sorted((new_tokens or {}).items(), key=lambda item: -len(item[0]))
        self.new_tokens = {token: tuple(ids) for token, ids in longest_first}
        self._new_token_pattern = _pattern_of(self.new_tokens)

    def forward(self, text: str | Sequence[str] | Tensor) -> Tensor:
        if isinstance(text, Tensor):
            return text
        rows = [self.encode(each) for each in ([text] if isinstance(text, str) else text)]
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), self.sequence_length)

    def encode(self, text: str) -> list[int]:
        """The `sequence_length` ids of one text; warns if its end is cut off."""
        pieces = self.pieces(text)
        fitting = pieces[: self._count_fitting(pieces)]
        if len(fitting) < len(pieces):
            count, room = sum(len(piece.token_ids) for piece in pieces), self.sequence_length - 2
            warnings.warn(
                f"{count} tokens, but only {room} fit, so this is cut off: {text[pieces[len(fitting)].start :]!r}; "
                "shorten the text, or encode it in chunks with encode_prompt",
                TruncationWarning,
                stacklevel=2,
            )
        return self.frame(token_id for piece in fitting for token_id in piece.token_ids)

    def frame(self, token_ids: Iterable[int]) -> list[int]:
        """Start, ids, end, padding. Raises ValueError if that is more than `sequence_length`."""
        framed = [self.start_token_id, *token_ids, self.end_token_id]
        if len(framed) > self.sequence_length:
            raise ValueError(f"{len(framed) - 2} token ids are given, but only {self.sequence_length - 2} fit")
        return framed + [self.pad_token_id] * (self.sequence_length - len(framed))

    def overflow(self, text: str) -> str:
        """The end of a text that is cut off; "" if all of it fits."""
        pieces = self.pieces(text)
        count = self._count_fitting(pieces)
        return text[pieces[count].start :] if count < len(pieces) else ""

    def pieces(self, text: str) -> list[Piece]:
        """All tokens of a text, without start and end. The ids of a new token are one piece."""
        if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"CLIPTokenizer takes a text, several, or a tensor of ids, not a {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text {text!r} is not valid Unicode ({error.reason})") from error
        return list(self._pieces(text))

    def with_new_tokens(self, new_tokens: Mapping[str, Sequence[int]]) -> Self:
        """The same tokenizer with these words in addition. Raises ValueError if one is there already, or no word."""
        for token in new_tokens:
            if not token.strip():
                raise ValueError(f"a new token must be a word, not {token!r}")
            if token.lower() in map(str.lower, self.new_tokens):
                raise ValueError(f"there is a token {token!r} already: choose another word")
        both = {**self.new_tokens, **new_tokens}
        return type(self)(self.vocabulary_path, self.sequence_length, self._pad_token_id, both)

    @property
    def vocabulary_size(self) -> int:
        """How many ids the vocabulary has, new tokens not counted: 49408 for CLIP's own."""
        return load_vocabulary(self.vocabulary_path).get_vocab_size()

    @property
    def start_token_id(self) -> int:
        """The id that every text starts with: 49406 for CLIP's own vocabulary."""
        return self.vocabulary_size - 2

    @property
    def end_token_id(self) -> int:
        """The id that follows every text: 49407 for CLIP's own vocabulary."""
        return self.vocabulary_size - 1

    @property
    def pad_token_id(self) -> int:
        """The id that fills up short sequences."""
        return self.end_token_id if self._pad_token_id is None else self._pad_token_id

    def extra_repr(self) -> str:
        new = f", new_tokens={list(self.new_tokens)}" if self.new_tokens else ""
        return f"sequence_length={self.sequence_length}{new}"

    def _pieces(self, text: str) -> Iterator[Piece]:
        position = 0
        for found in self._new_token_pattern.finditer(text) if self.new_tokens else ():
            yield from self._known_pieces(text, position, found.start())
            assert found.lastindex is not None
            yield Piece([*self.new_tokens.values()][found.lastindex - 1], found.start())
            position = found.end()
        yield from self._known_pieces(text, position, len(text))

    def _known_pieces(self, text: str, begin: int, end: int) -> Iterator[Piece]:
        encoded = load_vocabulary(self.vocabulary_path).encode(text[begin:end])
        for token_id, (start, _) in zip(encoded.ids, encoded.offsets, strict=True):
            yield Piece((token_id,), begin + start)

    def _count_fitting(self, pieces: Sequence[Piece]) -> int:
        length = 0
        for count, piece in enumerate(pieces):
            length += len(piece.token_ids)
            if length > self.sequence_length - 2:
                return count
        return len(pieces)


@functools.cache
def load_vocabulary(path: str) -> "Tokenizer":
    """The byte-pair encoder of a vocabulary; each file is read once. Raises ValueError if it is not in CLIP's form."""
    from tokenizers import AddedToken, Regex, Tokenizer
    from tokenizers.models import BPE
    from tokenizers.normalizers import NFC, Lowercase, Replace
    from tokenizers.normalizers import Sequence as Normalizers
    from tokenizers.pre_tokenizers import ByteLevel, Split
    from tokenizers.pre_tokenizers import Sequence as PreTokenizers

    merges = _read_merges(path)
    tokenizer = Tokenizer(BPE(_number_tokens(path, merges), merges, end_of_word_suffix=WORD_END, unk_token=END))
    tokenizer.normalizer = Normalizers([NFC(), Replace(Regex(r"\s+"), " "), Lowercase()])
    words = Split(Regex(_WORD), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = PreTokenizers([words, ByteLevel(add_prefix_space=False)])
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (START, END)])
    return tokenizer


def _read_merges(path: str) -> list[tuple[str, str]]:
    version, *lines = Path(path).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    if not version.startswith("#version"):
        raise ValueError(f"{path}: a vocabulary starts with a line '#version: …', not {version[:40]!r}")
    merges: list[tuple[str, str]] = []
    for number, parts in enumerate(map(str.split, lines), start=2):
        if len(parts) != 2:
            raise ValueError(f"{path}, line {number}: a merge is two parts with a blank between, not {parts}")
        merges.append((parts[0], parts[1]))
    return merges


def _number_tokens(path: str, merges: Iterable[tuple[str, str]]) -> dict[str, int]:
    alphabet = _byte_alphabet()
    tokens = dict.fromkeys([*alphabet, *(letter + WORD_END for letter in alphabet)])
    for number, (left, right) in enumerate(merges, start=2):
        merged = left + right
        if merged in tokens or left not in tokens or right not in tokens:
            raise ValueError(
                f"{path}, line {number}: the merge of {left!r} and {right!r} must join two known tokens to a new one"
            )
        tokens[merged] = None
    return {token: index for index, token in enumerate([*tokens, START, END])}


def _byte_alphabet() -> list[str]:
    """The 256 bytes as printable characters, in CLIP's order: those that are printable in Latin-1, then the others."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]


def _pattern_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """One group per token. A token that starts or ends like a word does not match inside a longer word."""
    groups = [
        (r"(?<!\w)" if token[0].isalnum() else "")
        + f"({re.escape(token)})"
        + (r"(?!\w)" if token[-1].isalnum() else "")
        for token in tokens
    ]
    return re.compile("|".join(groups), re.IGNORECASE)
