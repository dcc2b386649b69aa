"""Files of textual inversion: the forms of A1111 and diffusers are read, and nothing else passes for one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from refiners.weights import write_safetensors
from refiners.weights.concepts import MAX_VECTORS, read_concepts
from refiners.weights.formats import Content, identify_file

VECTORS = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
WIDE = torch.randn(3, 12, generator=torch.Generator().manual_seed(3))


def a1111(vectors: Tensor) -> dict[str, object]:
    """As its training saves them."""
    return {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": vectors},
        "name": "another",
        "step": 99,
        "sd_checkpoint": None,
    }


def first(vectors: Tensor) -> dict[str, object]:
    """As the code of the paper saves them."""
    return {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": nn.ParameterDict({"*": vectors})}


def saved(content: object, is_zip: bool = True) -> Callable[[Path], None]:
    return lambda path: torch.save(content, path, _use_new_zipfile_serialization=is_zip)


def written(**tensors: Tensor) -> Callable[[Path], None]:
    return lambda path: write_safetensors(path, tensors)


FILES: dict[str, tuple[Callable[[Path], None], dict[str, tuple[Tensor, ...]]]] = {
    "A1111": (saved(a1111(VECTORS)), {"toy": (VECTORS,)}),
    "A1111, older": (saved(a1111(nn.Parameter(VECTORS)), is_zip=False), {"toy": (VECTORS,)}),
    "the paper's": (saved(first(VECTORS)), {"toy": (VECTORS,)}),
    "A1111 safetensors": (written(emb_params=VECTORS), {"toy": (VECTORS,)}),
    "two encoders": (written(clip_l=VECTORS, clip_g=WIDE), {"toy": (WIDE, VECTORS)}),
    "diffusers": (saved({"<cat-toy>": VECTORS[0]}), {"<cat-toy>": (VECTORS[:1],)}),
    "diffusers safetensors": (
        written(**{"<a>": VECTORS, "<b>": VECTORS[1]}),
        {"<a>": (VECTORS,), "<b>": (VECTORS[1:2],)},
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_words_and_vectors_of_every_form_are_read(name: str, tmp_path: Path) -> None:
    write, expected = FILES[name]
    write(tmp_path / "toy.bin")
    assert identify_file(tmp_path / "toy.bin").content is Content.TEXTUAL_INVERSION
    read = read_concepts(tmp_path / "toy.bin")
    assert read.keys() == expected.keys()
    for word, vectors in expected.items():
        assert len(read[word]) == len(vectors)
        assert all(torch.equal(mine, other) for mine, other in zip(read[word], vectors, strict=True))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "NaN": (written(emb_params=VECTORS * float("nan")), "'emb_params' has values that are NaN"),
    "whole numbers": (
        written(emb_params=torch.ones(2, 8, dtype=torch.int32)),
        "is torch.int32, but the vectors of a word",
    ),
    "no vectors": (written(emb_params=torch.ones(0, 8)), r"has shape \(0, 8\)"),
    "a number": (written(emb_params=torch.ones(())), r"has shape \(\)"),
    "a book": (written(emb_params=torch.ones(MAX_VECTORS + 1, 8)), "at most 75 of them"),
    "a LoRA": (written(**{"lora_unet_x.lora_down.weight": VECTORS}), "is no textual inversion but LoRA"),
    "a module": (saved(nn.Linear(8, 8)), r"run code \(torch.nn.modules.linear.Linear\)"),
    "a module among the vectors": (
        saved({"string_to_param": nn.ParameterDict({"*": nn.ParameterDict({"*": VECTORS})})}),
        "is no textual inversion but a file of unknown content",
    ),
    "a module with its source": (
        saved(first(VECTORS), is_zip=False),
        "is not a torch file that can be read without running code",
    ),
    "no file of weights": (lambda path: path.write_bytes(b"hello, this is nothing"), "the file is damaged"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_with_path_and_reason(name: str, tmp_path: Path) -> None:
    write, reason = BROKEN[name]
    path = tmp_path / "toy.bin"
    write(path)
    with pytest.raises(ValueError, match=reason) as caught:
        read_concepts(path)
    assert str(path) in str(caught.value)
