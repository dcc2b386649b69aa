r"""Weighted prompts of any length, in the form that Automatic1111's web UI made common.

`(word)` counts 1.1 times, `(word:1.3)` 1.3 times, `[word]` 1 / 1.1 times; brackets nest and multiply; `\(` is a
bracket of the text. `BREAK` starts a new chunk; what does not fit in a chunk goes on in the next.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

import refiners.fluxion.layers as fl
from refiners.fluxion.checks import list_of_texts
from refiners.foundationals.clip.text_encoder import CLIPTextEncoder, TokenEncoder
from refiners.foundationals.clip.tokenizer import CLIPTokenizer

BRACKET_WEIGHT = 1.1
COMMA_REACH = 20  # as in the web UI: a chunk that is full ends at the last comma if it is that near
_SYNTAX = re.compile(
    r"""
    \\[\\()\[\]]?                             # an escaped character; a lone backslash counts nothing
    | :\s*(?P<weight>[+-]?[.\d]+)\s*\)
    | [()\[\]:]
    | [^\\()\[\]:]+
    """,
    re.VERBOSE,
)
_BREAK = re.compile(r"\s*\bBREAK\b\s*")


class WeightedText(NamedTuple):
    """A part of a prompt, without its brackets, and how much it counts."""

    text: str
    weight: float


BREAK = WeightedText("BREAK", -1.0)  # told from text by identity


class _WeightedPiece(NamedTuple):
    token_ids: tuple[int, ...]
    weight: float


def parse_prompt(prompt: str) -> list[WeightedText]:
    """The texts and weights of a prompt; `BREAK` itself stands where a new chunk was asked for.

    A bracket that is never closed lasts to the end; one that was never opened is text, as are weights outside brackets.
    Raises ValueError for a weight that looks like a number and is none.
    """
    parts: list[WeightedText] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}
    for found in _SYNTAX.finditer(prompt):
        text, number = found[0], found["weight"]
        if text in opened:
            opened[text].append(len(parts))
        elif number is not None and opened["("]:
            _multiply(parts, opened["("].pop(), _read_weight(number, prompt, found.start()))
        elif text == ")" and opened["("]:
            _multiply(parts, opened["("].pop(), BRACKET_WEIGHT)
        elif text == "]" and opened["["]:
            _multiply(parts, opened["["].pop(), 1 / BRACKET_WEIGHT)
        elif text.startswith("\\"):
            parts.append(WeightedText(text[1:], 1.0))
        else:
            parts.extend(_split_at_breaks(text))
    for start in opened["("]:
        _multiply(parts, start, BRACKET_WEIGHT)
    for start in opened["["]:
        _multiply(parts, start, 1 / BRACKET_WEIGHT)
    return list(_merge(parts)) or [WeightedText("", 1.0)]


def token_weights(
    tokenizer: CLIPTokenizer, prompt: str, comma_reach: int = COMMA_REACH
) -> tuple[Int[Tensor, "k l"], Float[Tensor, "k l"]]:
    """The token ids of a prompt's k chunks, l = sequence_length each, and the weight of each token.

    comma_reach: a chunk that is full ends after its last comma, if that is among its last tokens, this many.
    Raises ValueError for a malformed weight, or a concept of more vectors than a chunk holds.
    """
    size = tokenizer.sequence_length - 2
    ids: list[list[int]] = []
    weights: list[list[float]] = []
    for chunk in _chunks(tokenizer, parse_prompt(prompt), comma_reach):
        ids.append(tokenizer.frame(token_id for piece in chunk for token_id in piece.token_ids))
        spread = [piece.weight for piece in chunk for _ in piece.token_ids]
        weights.append([1.0, *spread, *[1.0] * (size - len(spread)), 1.0])
    return torch.tensor(ids), torch.tensor(weights, dtype=torch.float32)


def encode_prompt(
    encoder: fl.Chain, prompt: str | Sequence[str], comma_reach: int = COMMA_REACH
) -> Float[Tensor, "b l d"]:
    """Encode weighted prompts of any length: (B, k * sequence_length, D), k chunks for the longest of them.

    encoder: a text encoder, or two side by side, adapted or not.
    comma_reach: see `token_weights`.

    Each vector is multiplied by the weight of its token; then each chunk is scaled so that its mean is what it was, for
    each encoder apart.
    """
    return _encode(encoder, prompt, comma_reach)[0]


def encode_pooled_prompt(
    encoder: fl.Chain, prompt: str | Sequence[str], comma_reach: int = COMMA_REACH
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b p"]]:
    """As `encode_prompt`; and the vectors of the prompts as a whole, which are those of their first chunks, unweighted.

    Raises ValueError if the encoder has no projection that would give them.
    """
    embedding, pooled = _encode(encoder, prompt, comma_reach)
    if pooled is None:
        raise ValueError(f"this {type(encoder).__name__} gives no vector for a text as a whole: use encode_prompt")
    return embedding, pooled


def _encode(encoder: fl.Chain, prompt: str | Sequence[str], comma_reach: int) -> tuple[Tensor, Tensor | None]:
    prompts = list_of_texts(prompt, "the prompt")
    if not prompts:
        raise ValueError("there is no prompt to encode: give at least one, which may be empty")
    single_encoders = list(encoder.layers(CLIPTextEncoder)) or [encoder]
    tokenizers = [single.ensure_find(CLIPTokenizer) for single in single_encoders]
    rows = [[token_weights(tokenizer, each, comma_reach) for each in prompts] for tokenizer in tokenizers]
    count = max(len(ids) for of_one in rows for ids, _ in of_one)
    batches = [_batch(of_one, tokenizer, count) for of_one, tokenizer in zip(rows, tokenizers, strict=True)]
    output: Tensor | tuple[Tensor, Tensor] = encoder(*(ids for ids, _ in batches))
    embedding, pooled = output if isinstance(output, tuple) else (output, None)
    widths = [single.ensure_find(TokenEncoder).embedding_dim for single in single_encoders]
    parts: tuple[Tensor, ...] = torch.split(embedding, widths, dim=-1)
    pairs = zip(batches, parts, strict=True)
    weighted = torch.cat([_apply(weights.to(own.device), own.contiguous()) for (_, weights), own in pairs], dim=-1)
    embedding = weighted.reshape(count, len(prompts), *weighted.shape[1:]).transpose(0, 1).flatten(1, 2)
    return embedding, None if pooled is None else pooled[: len(prompts)]


def _batch(rows: Sequence[tuple[Tensor, Tensor]], tokenizer: CLIPTokenizer, count: int) -> tuple[Tensor, Tensor]:
    """The ids and weights of prompts, each filled up to `count` chunks, in one batch.

    The first chunks of all prompts come first: what is done for each prompt in turn, as LoRAs of their own, fits.
    """
    no_text = torch.tensor([tokenizer.frame([])])
    ids = torch.stack([torch.cat([ids, no_text.expand(count - len(ids), -1)]) for ids, _ in rows], dim=1)
    weights = torch.stack([torch.cat([each, torch.ones(count - len(each), each.shape[1])]) for _, each in rows], dim=1)
    return ids.flatten(0, 1), weights.flatten(0, 1)


def _apply(weights: Tensor, embedding: Tensor) -> Tensor:
    weighted = embedding * weights[..., None].to(embedding.dtype)
    before, after = (x.float().mean(dim=(1, 2), keepdim=True) for x in (embedding, weighted))
    scale = torch.where(after == 0, torch.ones_like(after), before / after)
    return weighted * scale.to(embedding.dtype)


def _read_weight(number: str, prompt: str, position: int) -> float:
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise ValueError(
            f"the weight {number!r} at character {position} of the prompt {prompt!r} is no number; write one as in "
            "(word:1.3), or \\) if the bracket is text"
        )
    return weight


def _split_at_breaks(text: str) -> Iterator[WeightedText]:
    for index, part in enumerate(_BREAK.split(text)):
        if index:
            yield BREAK
        yield WeightedText(part, 1.0)


def _multiply(parts: list[WeightedText], start: int, factor: float) -> None:
    parts[start:] = [part if part is BREAK else part._replace(weight=part.weight * factor) for part in parts[start:]]


def _merge(parts: Iterable[WeightedText]) -> Iterator[WeightedText]:
    """Join neighbours of the same weight, so that words are not torn apart."""
    last: WeightedText | None = None
    for part in parts:
        if last is not None and last is not BREAK and part is not BREAK and last.weight == part.weight:
            last = last._replace(text=last.text + part.text)
            continue
        if last is not None:
            yield last
        last = part
    if last is not None:
        yield last


def _chunks(tokenizer: CLIPTokenizer, parts: Iterable[WeightedText], comma_reach: int) -> list[list[_WeightedPiece]]:
    size, comma = tokenizer.sequence_length - 2, tokenizer.pieces(",")[0].token_ids
    chunks: list[list[_WeightedPiece]] = [[]]
    for part in parts:
        if part is BREAK:
            chunks.append([])
            continue
        for token_ids, _ in tokenizer.pieces(part.text):
            while _length(chunks[-1]) + len(token_ids) > size:
                chunks[-1:] = _split(chunks[-1], size, comma, 0 if token_ids == comma else comma_reach)
            chunks[-1].append(_WeightedPiece(token_ids, part.weight))
    return chunks if chunks[-1] or len(chunks) == 1 else chunks[:-1]


def _split(
    chunk: list[_WeightedPiece], size: int, comma: tuple[int, ...], reach: int
) -> tuple[list[_WeightedPiece], list[_WeightedPiece]]:
    """What stays in a chunk that has no room left, and what moves to the next one."""
    if not chunk:
        raise ValueError(f"a concept of the prompt has more vectors than a chunk has room for, which is {size}")
    is_full = _length(chunk) == size
    for count in range(len(chunk), 0, -1):
        if not is_full or _length(chunk[count - 1 :]) > reach:
            break
        if chunk[count - 1].token_ids == comma:
            return chunk[:count], chunk[count:]
    return chunk, []


def _length(chunk: Iterable[_WeightedPiece]) -> int:
    return sum(len(piece.token_ids) for piece in chunk)
