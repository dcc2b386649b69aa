"""Weighted prompts: how they are read, cut into chunks, weighted; against a plain computation."""

import dataclasses
import itertools
from collections.abc import Iterator

import pytest
import torch
from clip_specimens import SMALL, build_small, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import CLIPTokenizer as TransformersTokenizer

from refiners.foundationals.clip.prompts import BREAK, encode_prompt, parse_prompt, token_weights
from refiners.foundationals.clip.text_encoder import CLIPTextEncoder
from refiners.foundationals.clip.tokenizer import CLIPTokenizer

PROMPTS: list[tuple[str, list[tuple[str, float]]]] = [
    ("", [("", 1.0)]),
    ("a red ring", [("a red ring", 1.0)]),
    ("a (red) ring", [("a ", 1.0), ("red", 1.1), (" ring", 1.0)]),
    ("a [red] ring", [("a ", 1.0), ("red", 1 / 1.1), (" ring", 1.0)]),
    ("a (red:1.5) ring", [("a ", 1.0), ("red", 1.5), (" ring", 1.0)]),
    ("(red: .5 )(blue:-1)(green:+2.)", [("red", 0.5), ("blue", -1.0), ("green", 2.0)]),
    ("((red))", [("red", 1.1 * 1.1)]),
    ("[[red]]", [("red", 1 / 1.1 / 1.1)]),
    ("(a (red:2) ring:3)", [("a ", 3.0), ("red", 6.0), (" ring", 3.0)]),
    ("(a [b] c)", [("a ", 1.1), ("b", 1.0), (" c", 1.1)]),
    ("(a [b:2) c]", [("a ", 2.0), ("b", 2 / 1.1), (" c", 1 / 1.1)]),
    ("(one)(kind)", [("onekind", 1.1)]),
    (r"\(no\) \[none\] \\", [(r"(no) [none] " + "\\", 1.0)]),
    (r"(\(x\):2)", [("(x)", 2.0)]),
    (r"back\slash", [("backslash", 1.0)]),
    ("(open ((more", [("open ", 1.1), ("more", 1.1 * 1.1 * 1.1)]),
    ("[open", [("open", 1 / 1.1)]),
    ("never) opened]", [("never) opened]", 1.0)]),
    ("ratio 16:9 a:1.5) b", [("ratio 16:9 a:1.5) b", 1.0)]),
    ("(a:b)", [("a:b", 1.1)]),
    ("(a:1.2 b)", [("a:1.2 b", 1.1)]),
    ("(a:1e5)", [("a:1e5", 1.1)]),
    ("[a:1.5]", [("a:1.5", 1 / 1.1)]),
    ("()", [("", 1.0)]),
    ("a BREAK b", [("a", 1.0), ("BREAK", -1.0), ("b", 1.0)]),
    ("(a\nBREAK\nb:2)", [("a", 2.0), ("BREAK", -1.0), ("b", 2.0)]),
    ("BREAKFAST break", [("BREAKFAST break", 1.0)]),
]


class TestParsing:
    @pytest.mark.parametrize(("prompt", "expected"), PROMPTS)
    def test_a_table(self, prompt: str, expected: list[tuple[str, float]]) -> None:
        parts = parse_prompt(prompt)
        assert [text for text, _ in parts] == [text for text, _ in expected]
        assert [weight for _, weight in parts] == pytest.approx([weight for _, weight in expected])
        assert [part is BREAK for part in parts] == [text == "BREAK" for text, _ in expected]

    @pytest.mark.parametrize("weight", ["1.2.3", ".", "+.", "1..5", "9" * 400])
    def test_a_weight_that_is_no_number_is_refused(self, weight: str) -> None:
        with pytest.raises(ValueError, match=r"the weight '.*' at character 6 of the prompt 'a \(cat:.* is no number"):
            parse_prompt(f"a (cat:{weight})")

    @given(st.text())
    @settings(deadline=None)
    def test_escaped_text_is_itself(self, text: str) -> None:
        text = text.replace("BREAK", "")
        escaped = "".join(f"\\{letter}" if letter in "\\()[]" else letter for letter in text)
        assert parse_prompt(escaped) == [(text, 1.0)]

    @given(st.text("ab (:[)]\\1.2,\nBREAK"))
    @settings(deadline=None)
    def test_any_prompt_is_read_or_refused(self, prompt: str) -> None:
        try:
            parts = parse_prompt(prompt)
        except ValueError as error:
            assert "is no number" in str(error)
            return
        assert parts
        assert all(a.weight != b.weight or BREAK in (a, b) for a, b in itertools.pairwise(parts))

    @given(st.recursive(st.text("ab ,", min_size=1), lambda inner: st.tuples(st.sampled_from("([w"), st.lists(inner))))
    @settings(deadline=None, max_examples=30)
    def test_nested_brackets_multiply(self, tree: object) -> None:
        expected = [(letter, weight) for text, weight in weighted(tree, 1.0) for letter in text]
        letters = [(letter, weight) for text, weight in parse_prompt(written(tree)) for letter in text]
        assert [letter for letter, _ in letters] == [letter for letter, _ in expected]
        assert [weight for _, weight in letters] == pytest.approx([weight for _, weight in expected])


def written(tree: object) -> str:
    if isinstance(tree, str):
        return tree
    kind, inner = tree
    text = "".join(map(written, inner))
    return {"(": f"({text})", "[": f"[{text}]", "w": f"({text}:0.7)"}[kind]


def weighted(tree: object, weight: float) -> Iterator[tuple[str, float]]:
    if isinstance(tree, str):
        yield tree, weight
        return
    kind, inner = tree
    for part in inner:
        yield from weighted(part, weight * {"(": 1.1, "[": 1 / 1.1, "w": 0.7}[kind])


def lengths(prompt: str, tokenizer: CLIPTokenizer, comma_reach: int = 20) -> list[int]:
    """How many tokens of text each chunk has."""
    ids, _ = token_weights(tokenizer, prompt, comma_reach)
    end = tokenizer.end_token_id
    return [row.index(end) - 1 for row in ids.tolist()]


class TestChunks:
    tokenizer = CLIPTokenizer(sequence_length=12)  # ten tokens of text
    padded = CLIPTokenizer(pad_token_id=0)

    @pytest.mark.parametrize(
        ("prompt", "expected"),
        [
            ("", [0]),
            ("a " * 10, [10]),
            ("a " * 11, [10, 1]),
            ("a " * 25, [10, 10, 5]),
            ("a BREAK b", [1, 1]),
            ("BREAK a", [0, 1]),
            ("a BREAK", [1]),
            ("a BREAK BREAK b", [1, 0, 1]),
            ("BREAK", [0]),
            ("a " * 11 + "BREAK b", [10, 1, 1]),
        ],
    )
    def test_hold_what_fits(self, prompt: str, expected: list[int]) -> None:
        assert lengths(prompt, self.tokenizer) == expected

    @pytest.mark.parametrize(
        ("prompt", "reach", "expected"),
        [
            ("a " * 6 + ", a a a a a", 4, [7, 5]),  # the comma is the fourth from the end
            ("a " * 6 + ", a a a a a", 3, [10, 2]),
            ("a " * 6 + ", a a a a a", 0, [10, 2]),
            ("a " * 6 + ", a , a a a", 20, [9, 3]),
            ("a " * 9 + ", a", 20, [10, 1]),
            ("a " * 4 + ", a a a a a , a", 20, [10, 2]),  # a comma that does not fit takes nothing along
        ],
    )
    def test_end_at_a_comma_that_is_near(self, prompt: str, reach: int, expected: list[int]) -> None:
        assert lengths(prompt, self.tokenizer, reach) == expected

    def test_keep_concepts_whole(self) -> None:
        tokenizer = self.tokenizer.with_new_tokens({"<x>": range(50000, 50004), "<big>": range(60000, 60011)})
        assert lengths("a " * 6 + "<x> a", tokenizer) == [10, 1]
        assert lengths("a " * 7 + "<x> a", tokenizer) == [7, 5]
        assert lengths("a , " + "a " * 5 + "<x> a", tokenizer) == [7, 5]
        assert lengths("a , " + "a " * 8 + "<x>", tokenizer) == [2, 8, 4]
        with pytest.raises(ValueError, match="more vectors than a chunk has room for, which is 10"):
            token_weights(tokenizer, "a <big>")

    @given(st.text("ab ,()[]", max_size=120))
    @settings(deadline=None, max_examples=50)
    def test_lose_and_reorder_nothing(self, prompt: str) -> None:
        ids, weights = token_weights(self.tokenizer, prompt)
        parts = [(self.tokenizer.pieces(text), weight) for text, weight in parse_prompt(prompt)]
        expected = [(piece.token_ids[0], weight) for pieces, weight in parts for piece in pieces]
        found: list[tuple[int, float]] = []
        for row, row_weights, length in zip(ids.tolist(), weights, lengths(prompt, self.tokenizer), strict=True):
            assert row == self.tokenizer.frame(row[1 : length + 1]) and row_weights[0] == 1
            assert (row_weights[length + 1 :] == 1).all()
            found += zip(row[1 : length + 1], row_weights[1 : length + 1].tolist(), strict=True)
        assert [token_id for token_id, _ in found] == [token_id for token_id, _ in expected]
        assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected])

    def test_are_framed_and_padded(self, transformers_tokenizer: TransformersTokenizer) -> None:
        text = "an owl and a pussycat went to sea in a beautiful pea green boat " * 8
        ids = transformers_tokenizer(text, add_special_tokens=False)["input_ids"]
        expected = [[49406, *ids[start : start + 75], 49407] for start in range(0, len(ids), 75)]
        expected[-1] += [0] * (77 - len(expected[-1]))
        assert token_weights(self.padded, text)[0].tolist() == expected


class TestEncoding:
    encoder = build_small(dataclasses.replace(SMALL, num_layers=1))
    tokenizer: CLIPTokenizer = encoder.CLIPTokenizer

    def plainly(self, chunks: list[list[tuple[str, float]]]) -> Tensor:
        """Each chunk alone, vector by vector, as the web UI does it."""
        encoded: list[Tensor] = []
        for chunk in chunks:
            pieces = [(self.tokenizer.pieces(text), weight) for text, weight in chunk]
            ids = [piece.token_ids[0] for pieces_here, _ in pieces for piece in pieces_here]
            weights = [weight for pieces_here, weight in pieces for _ in pieces_here]
            z = self.encoder(torch.tensor([self.tokenizer.frame(ids)]))
            before = z.mean()
            for index, weight in enumerate(weights):
                z[0, 1 + index] *= weight
            encoded.append(z * (before / z.mean()))
        return torch.cat(encoded, dim=1)

    @torch.no_grad()
    def test_weights_multiply_and_the_mean_stays(self) -> None:
        embedding = encode_prompt(self.encoder, "a (red:1.5) ring [on] a ((blue)) square")
        expected = self.plainly(
            [[("a", 1), ("red", 1.5), ("ring", 1), ("on", 1 / 1.1), ("a", 1), ("blue", 1.1 * 1.1), ("square", 1)]]
        )
        assert embedding.shape == (1, 77, 32) and relative_error(embedding, expected) < 1e-6

    @torch.no_grad()
    def test_chunks_follow_one_another(self) -> None:
        embedding = encode_prompt(self.encoder, "a (red:1.5) ring BREAK (blue:0.5)" + " a" * 80)
        expected = self.plainly(
            [[("a", 1), ("red", 1.5), ("ring", 1)], [("blue", 0.5), (" a" * 74, 1)], [(" a" * 6, 1)]]
        )
        assert embedding.shape == (1, 3 * 77, 32) and relative_error(embedding, expected) < 1e-6

    @torch.no_grad()
    def test_a_batch_is_padded_and_its_prompts_do_not_mix(self) -> None:
        prompts = ["a (red:1.5) ring", "a BREAK [b]", ""]
        together = encode_prompt(self.encoder, prompts)
        assert together.shape == (3, 2 * 77, 32)
        nothing = self.encoder("")
        for row, prompt in zip(together, prompts, strict=True):
            alone = encode_prompt(self.encoder, prompt)
            padded = torch.cat([alone, nothing], dim=1)[:, : 2 * 77]
            torch.testing.assert_close(row, padded[0], rtol=1e-5, atol=1e-6)

    @torch.no_grad()
    def test_without_weights_it_is_the_encoder_bit_for_bit(self) -> None:
        assert torch.equal(encode_prompt(self.encoder, "a red ring"), self.encoder("a red ring"))

    @torch.no_grad()
    def test_a_mean_of_zero_does_no_harm(self) -> None:
        encoder = CLIPTextEncoder(dataclasses.replace(SMALL, num_layers=1))
        torch.nn.init.zeros_(encoder.LayerNorm.weight)
        assert torch.equal(encode_prompt(encoder, "a (red:1.5) ring"), torch.zeros(1, 77, 32))

    @torch.no_grad()
    def test_half_precision_stays_close(self) -> None:
        prompt = "a (red:1.5) ring"
        half = build_small(dataclasses.replace(SMALL, num_layers=1)).to(torch.bfloat16)
        embedding = encode_prompt(half, prompt)
        assert embedding.dtype == torch.bfloat16
        assert relative_error(embedding.float(), encode_prompt(self.encoder, prompt)) < 0.05

    def test_no_prompts_are_refused(self) -> None:
        with pytest.raises(ValueError, match="there is no prompt to encode"):
            encode_prompt(self.encoder, [])
