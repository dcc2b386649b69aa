"""The tokenizer: equal to transformers' on any text, lazy, open about what it cuts off."""

import copy
import pickle
import subprocess
import sys
import unicodedata
import warnings
from pathlib import Path

import clip_specimens
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer as TransformersTokenizer

from refiners.foundationals.clip.tokenizer import VOCABULARY_PATH, CLIPTokenizer, TruncationWarning, load_vocabulary

TEXTS = [
    "",
    " ",
    "a photo of a cat",
    "A Photo of a CAT, 4K!!! (highly detailed:1.2)",
    "don't you've we're I'll he'd it's I'm 'tis o'clock DON'T don\u2019t",
    "'s 'S ''s !'s 's's",
    "hello_world foo-bar a/b\\c a.b.c ...",
    "12345 1a2b 3.14 ½ ² Ⅷ ١٢٣",
    "tabs\tand\nnew\r\nlines  \u00a0\u2003\u3000\u2028\u0085 odd\x0bblanks",
    "zero\u200bwidth \u200djoiner \ufeffbom soft\u00adhyphen",
    "control \x00\x01\x1f\x7f\x80 characters",
    "café cafe\u0301 Å A\u030a ﬁ \u017f ß ẞ İ \u0131 ǅ Σ ΑΣ \u212a",
    "combining a\u0301\u0327\u0300 \u0301alone q\u0307\u0323",
    "漢字とひらがなとカタカナ 한국어 \u1112\u1161\u11ab 中文\uff0c标点。",
    "नमस्ते ಠ_ಠ ภาษาไทย עִבְרִית العَرَبِيَّة",
    "😀 👩‍👩‍👧‍👦 🇫🇷 👍🏽 ❤️ ☺",
    "\U0001d573\U0001d58a\U0001d591 \U0001f9ff\U000e0041\U0010ffff \ufffd \ue000",
    "<|startoftext|> <|endoftext|>",
    "a<|endoftext|>b<|STARTOFTEXT|>c <|EndOfText|> <|end of text|> <| |>",
    "</w> a</w> <pad> [UNK] Ġ ġ Ċ",
    "supercalifragilisticexpialidocious pneumonoultramicroscopicsilicovolcanoconiosis",
    "word " * 74,
    "word " * 75,
    "word " * 76,
    "漢" * 100,
]
FRAGMENTS = [
    "<|endoftext|>",
    "<|StartOfText|>",
    "'s",
    "'LL",
    "\u2019s",
    "\u0301",
    "İ",
    "Σ",
    "\u200d",
    "😀",
    "漢",
    "\x85",
]
any_character = st.characters(codec="utf-8")
any_text = st.lists(st.one_of(st.text(any_character), st.sampled_from(FRAGMENTS)), max_size=8).map("".join)


def ids_by_transformers(tokenizer: TransformersTokenizer, text: str) -> list[int]:
    return tokenizer(text, truncation=True, max_length=77, padding="max_length")["input_ids"]


@pytest.mark.filterwarnings("ignore::refiners.foundationals.clip.tokenizer.TruncationWarning")
class TestEqualsTransformers:
    @pytest.mark.parametrize("text", TEXTS)
    def test_on_a_table(self, text: str, transformers_tokenizer: TransformersTokenizer) -> None:
        assert CLIPTokenizer().encode(text) == ids_by_transformers(transformers_tokenizer, text)

    @given(any_text)
    @settings(max_examples=150, deadline=None)
    def test_on_any_text(self, transformers_tokenizer: TransformersTokenizer, text: str) -> None:
        assert CLIPTokenizer().encode(text) == ids_by_transformers(transformers_tokenizer, text)

    @pytest.mark.slow
    def test_on_every_assigned_character(self, transformers_tokenizer: TransformersTokenizer) -> None:
        ours = CLIPTokenizer(sequence_length=4096)
        bulky = ("CJK UNIFIED", "HANGUL SYLLABLE", "TANGUT IDEOGRAPH", "EGYPTIAN HIEROGLYPH", "CUNEIFORM")
        characters = [
            chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) not in ("Cn", "Co", "Cs")
        ]
        characters = [c for c in characters if not unicodedata.name(c, "").startswith(bulky)]
        assert len(characters) > 35_000
        for start in range(0, len(characters), 256):
            text = " ".join(f"x{character}y" for character in characters[start : start + 256])
            ids = [token_id for piece in ours.pieces(text) for token_id in piece.token_ids]
            assert ids == transformers_tokenizer(text, add_special_tokens=False)["input_ids"], hex(start)

    @given(any_text)
    @settings(max_examples=50, deadline=None)
    def test_with_a_small_vocabulary(self, tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
        folder = tmp_path_factory.mktemp("small")
        path = write_small_vocabulary(folder)
        ours, theirs = CLIPTokenizer(path), clip_specimens.load_transformers_tokenizer(folder, path)
        assert ours.vocabulary_size == 512 + 300 + 2
        assert ours.encode(text) == ids_by_transformers(theirs, text)


def write_small_vocabulary(folder: Path, merges: int = 300) -> Path:
    lines = VOCABULARY_PATH.read_text(encoding="utf-8").split("\n")
    path = folder / "small.txt"
    path.write_text("\n".join(lines[: merges + 1]) + "\n", encoding="utf-8")
    return path


class TestInputs:
    def test_a_text_and_several_texts_give_a_batch_of_ids(self) -> None:
        tokenizer = CLIPTokenizer()
        one, two = tokenizer("a cat"), tokenizer(["a cat", ""])
        assert one.shape == (1, 77) and two.shape == (2, 77) and two.dtype == torch.int64
        assert one[0, :4].tolist() == [49406, 320, 2368, 49407] and torch.equal(one[0], two[0])
        assert two[1].tolist() == [49406, *[49407] * 76]
        assert tokenizer([]).shape == (0, 77)

    def test_a_tensor_passes_unchanged(self) -> None:
        ids = torch.tensor([[1, 2, 3]])
        assert CLIPTokenizer()(ids) is ids

    def test_the_pad_id_fills_up_behind_the_end(self) -> None:
        assert CLIPTokenizer(pad_token_id=0)("a cat")[0, 3:].tolist() == [49407, *[0] * 73]

    @pytest.mark.parametrize("wrong", [3, ["a", 3], [["a"]]])
    def test_what_is_no_text_is_refused(self, wrong: object) -> None:
        with pytest.raises(TypeError, match=r"takes a text, several, or a tensor|not iterable"):
            CLIPTokenizer()(wrong)

    def test_a_lone_surrogate_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"not valid Unicode \(surrogates not allowed\)"):
            CLIPTokenizer()("a \ud800 b")

    def test_a_sequence_too_short_for_a_token_is_refused(self) -> None:
        with pytest.raises(ValueError, match="sequence_length=2 must be at least 3"):
            CLIPTokenizer(sequence_length=2)


class TestTruncation:
    def test_what_does_not_fit_is_named_in_a_warning(self) -> None:
        tokenizer = CLIPTokenizer(sequence_length=5)
        with pytest.warns(TruncationWarning, match=r"5 tokens, but only 3 fit, so this is cut off: 'big dog'"):
            ids = tokenizer("a cat, big dog")
        assert ids[0].tolist() == [49406, 320, 2368, 267, 49407]
        assert tokenizer.overflow("a cat, big dog") == "big dog"

    def test_what_just_fits_gives_no_warning(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert CLIPTokenizer(sequence_length=5)("a cat,")[0, -1] == 49407
        assert CLIPTokenizer(sequence_length=5).overflow("a cat,") == ""

    @given(any_text)
    @settings(max_examples=50, deadline=None)
    def test_the_overflow_is_an_end_of_the_text(self, text: str) -> None:
        tokenizer = CLIPTokenizer(sequence_length=6)
        assert text.endswith(tokenizer.overflow(text))
        assert (tokenizer.overflow(text) == "") == (len(tokenizer.pieces(text)) <= 4)


class TestNewTokens:
    tokenizer = CLIPTokenizer(new_tokens={"<cat>": [49408], "<cat>s": [49409, 49410], "ohwx": [49411]})

    def ids(self, text: str) -> list[int]:
        return [token_id for piece in self.tokenizer.pieces(text) for token_id in piece.token_ids]

    @pytest.mark.parametrize(
        ("text", "ids"),
        [
            ("a <cat>", [320, 49408]),
            ("a<CAT>a", [320, 49408, 320]),
            ("<cat>s", [49409, 49410]),
            ("ohwx cat", [49411, 2368]),
            ("OHWX-cat", [49411, 268, 2368]),
            ("", []),
        ],
    )
    def test_stand_for_their_ids(self, text: str, ids: list[int]) -> None:
        assert self.ids(text) == ids

    @pytest.mark.parametrize("text", ["ohwxy", "mohwx", "ohwx1", "<ca t>", "a plain text"])
    def test_leave_other_words_alone(self, text: str) -> None:
        assert [CLIPTokenizer().encode(text)] == self.tokenizer(text).tolist()

    def test_are_cut_off_whole(self) -> None:
        tokenizer = CLIPTokenizer(sequence_length=4, new_tokens=self.tokenizer.new_tokens)
        with pytest.warns(TruncationWarning, match="cut off: '<cat>s b'"):
            assert tokenizer("a <cat>s b")[0].tolist() == [49406, 320, 49407, 49407]

    def test_must_be_words_and_new(self) -> None:
        with pytest.raises(ValueError, match=r"there is a token 'OhWx' already"):
            self.tokenizer.with_new_tokens({"OhWx": [1]})
        with pytest.raises(ValueError, match=r"must be a word, not ' '"):
            self.tokenizer.with_new_tokens({" ": [1]})


class TestVocabulary:
    @pytest.mark.slow
    def test_is_not_loaded_by_the_import(self) -> None:
        code = (
            "import sys, refiners.foundationals.clip as clip; clip.CLIPTokenizer(); print('tokenizers' in sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"

    def test_is_read_once(self) -> None:
        assert load_vocabulary(str(VOCABULARY_PATH)) is load_vocabulary(str(VOCABULARY_PATH))

    def test_tokenizers_copy_and_pickle(self) -> None:
        tokenizer = CLIPTokenizer(pad_token_id=0, new_tokens={"<cat>": [49408]})
        for clone in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
            assert torch.equal(clone("a <cat>"), tokenizer("a <cat>"))

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("i n\n", "starts with a line '#version: …', not 'i n'"),
            (
                "#version: 0.2\ni n\nt h e\n",
                r"line 3: a merge is two parts with a blank between, not \['t', 'h', 'e'\]",
            ),
            ("#version: 0.2\ni n\n\n", r"line 3: a merge is two parts"),
            ("#version: 0.2\nin g\n", "line 2: the merge of 'in' and 'g' must join two known"),
            ("#version: 0.2\ni n\ni n\n", "line 3: the merge of 'i' and 'n' must join two known tokens to a new one"),
        ],
    )
    def test_that_is_malformed_is_refused(self, content: str, message: str, tmp_path: Path) -> None:
        path = tmp_path / "vocabulary.txt"
        path.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            CLIPTokenizer(path)("a")
