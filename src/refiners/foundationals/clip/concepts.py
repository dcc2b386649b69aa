"""Textual inversion (arXiv 2208.01618): new words for a text encoder, each with vectors of its own."""

from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.adapters.adapter import Adapter
from refiners.fluxion.layers.module import single_output
from refiners.foundationals.clip.text_encoder import CLIPTextEncoder, TokenEncoder
from refiners.foundationals.clip.tokenizer import CLIPTokenizer
from refiners.weights.concepts import read_concepts


@single_output
class KnownTokenIds(fl.Module):
    """Puts 0 for those of `new_ids`, which the embedding below does not have."""

    def __init__(self, new_ids: range) -> None:
        super().__init__()
        self.new_ids = new_ids

    def forward(self, token_ids: Tensor) -> Tensor:
        return token_ids.masked_fill(_is_in(token_ids, self.new_ids), 0)

    def extra_repr(self) -> str:
        return f"new_ids={self.new_ids}"


class Concept(fl.WeightedModule):
    """The vectors of one word, (n, D), for n ids from `first_id` on; takes ids and vectors, and returns both.

    Puts its vectors in the place of those that the base gave at its ids.
    """

    def __init__(self, token: str, first_id: int, embedding: Tensor) -> None:
        super().__init__()
        self.token = token
        self.token_ids = range(first_id, first_id + len(embedding))
        self.weight = nn.Parameter(embedding)

    def forward(self, token_ids: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        is_own = _is_in(token_ids, self.token_ids)
        own = nn.functional.embedding((token_ids - self.token_ids.start).masked_fill(~is_own, 0), self.weight)
        return token_ids, torch.where(is_own.unsqueeze(-1), own.to(vectors.dtype), vectors)

    def extra_repr(self) -> str:
        return f"{self.token!r}, {len(self.token_ids)}"


class EmbeddingExtender(fl.Chain, Adapter[TokenEncoder]):
    """Gives a token embedding more vectors than it has; those it has stay where they are."""

    def __init__(self, target: TokenEncoder) -> None:
        self.first_id = target.num_embeddings
        with self.setup_adapter(target):
            super().__init__(
                fl.Parallel(
                    fl.Identity(),
                    fl.Chain(KnownTokenIds(range(self.first_id, self.first_id)), target),
                ),
                fl.GetArg(1),
            )

    def add_concept(self, token: str, embedding: Tensor) -> Concept:
        """Append the vectors of a word, (n, D)."""
        known, place = next(self.walk(KnownTokenIds))
        weight = self.target.weight
        concept = Concept(token, known.new_ids.stop, embedding.detach().to(weight.device, weight.dtype, copy=True))
        with fl.transaction():
            place.replace(known, KnownTokenIds(range(self.first_id, concept.token_ids.stop)))
            self.insert(len(self) - 1, concept)
        return concept


class TokenExtender(fl.Chain, Adapter[CLIPTokenizer]):
    """Gives a tokenizer more words than it has."""

    def __init__(self, target: CLIPTokenizer) -> None:
        with self.setup_adapter(target):
            super().__init__(target.with_new_tokens({}))

    def add_token(self, token: str, token_ids: range) -> None:
        """Have `token` read as these ids. Raises ValueError if it is there already, or no word."""
        tokenizer = self.layer(0, CLIPTokenizer)
        self.replace(tokenizer, tokenizer.with_new_tokens({token: token_ids}))


class ConceptExtender(fl.Chain, Adapter[CLIPTextEncoder]):
    """Teaches a text encoder new words, by vectors that textual inversion has found.

    >>> from refiners.foundationals.clip import CLIPTextEncoder, CLIPTextSpec
    >>> encoder = CLIPTextEncoder(CLIPTextSpec(embedding_dim=8, num_layers=1, num_attention_heads=1, feedforward_dim=8))
    >>> extender = ConceptExtender(encoder)
    >>> extender.add_concept("<cat-toy>", torch.randn(2, 8))  # a word of two vectors
    >>> _ = extender.inject()
    >>> embedding = encoder("a photo of a <cat-toy>")
    >>> extender.eject()
    """

    def __init__(self, target: CLIPTextEncoder) -> None:
        if len(list(target.layers(CLIPTextEncoder))) > 1:
            raise ValueError(
                f"a ConceptExtender is for one text encoder, and this {type(target).__name__} has several: make one "
                "for each of its layers(CLIPTextEncoder)"
            )
        # in a tuple: they join the tree when injected
        self._parts = (
            TokenExtender(target.ensure_find(CLIPTokenizer)),
            EmbeddingExtender(target.ensure_find(TokenEncoder)),
        )
        with self.setup_adapter(target):
            super().__init__(target)

    def add_concept(self, token: str, embedding: Tensor) -> None:
        """Add a word and its vectors: (D,) for one, (n, D) for several. Possible before and after `inject`.

        token: matches in any case of letters; as a word of letters it does not match inside a longer one.
        Raises ValueError if the shape does not fit, the word is there already, or is none.
        """
        width = self._embeddings.target.embedding_dim
        vectors = embedding.unsqueeze(0) if embedding.ndim == 1 else embedding
        if vectors.ndim != 2 or not len(vectors) or vectors.shape[1] != width:
            raise ValueError(
                f"the embedding of {token!r} has shape {tuple(embedding.shape)}, but this encoder takes ({width},) or "
                f"(n, {width})"
            )
        with fl.transaction():
            concept = self._embeddings.add_concept(token, vectors)
            self._tokens.add_token(token, concept.token_ids)

    def load(self, path: Path | str, token: str | None = None) -> list[str]:
        """Add the words of a textual inversion file (A1111's or diffusers') that are for this encoder, and list them.

        token: what the word is to be, if the file has one; None for what the file calls it, or is called itself. Such
            a word can be one of everyday language.
        Raises ValueError, and adds nothing, if the file is damaged, holds something else, is for another encoder, or
        teaches a word that is there already; FileNotFoundError if there is none.
        """
        words = read_concepts(path)
        if token is not None and len(words) != 1:
            raise ValueError(f"{path} has {len(words)} words ({', '.join(words):.200}), so they keep their names")
        width = self._embeddings.target.embedding_dim
        fitting = {
            token or word: next((rows for rows in vectors if rows.shape[1] == width), vectors[0])
            for word, vectors in words.items()
        }
        with fl.transaction():
            for word, rows in fitting.items():
                try:
                    self.add_concept(word, rows)
                except ValueError as error:
                    raise ValueError(f"{path}: {error}") from error
        return list(fitting)

    @property
    def concepts(self) -> dict[str, Tensor]:
        """The vectors of each word, (n, D): parameters, to train or to save."""
        return {concept.token: concept.weight for concept in self._embeddings.layers(Concept)}

    def inject(self, parent: fl.Chain | None = None) -> Self:
        tokens, embeddings = self._tokens, self._embeddings
        if self.target.find(EmbeddingExtender) is not None:
            raise RuntimeError("this encoder has a ConceptExtender already: add the concepts to that one")
        for concept in embeddings.layers(Concept):
            concept.to(embeddings.target.weight.device)
        tokens.inject(self.target.ensure_find_parent(tokens.target))
        embeddings.inject(self.target.ensure_find_parent(embeddings.target))
        return super().inject(parent)

    def eject(self) -> None:
        tokens, embeddings = self._tokens, self._embeddings
        super().eject()
        embeddings.eject()
        tokens.eject()

    @property
    def _tokens(self) -> TokenExtender:
        found = self.find(TokenExtender)  # in a structural copy it is not the one that was built here
        return self._parts[0] if found is None else found

    @property
    def _embeddings(self) -> EmbeddingExtender:
        found = self.find(EmbeddingExtender)
        return self._parts[1] if found is None else found


def _is_in(token_ids: Tensor, new_ids: range) -> Tensor:
    return (token_ids >= new_ids.start) & (token_ids < new_ids.stop)
