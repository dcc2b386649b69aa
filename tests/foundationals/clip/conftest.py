"""Lets the tests of this folder import `clip_specimens`, and builds what is slow to build once."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import clip_specimens
from transformers import CLIPTokenizer


@pytest.fixture(scope="session")
def transformers_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    """transformers' tokenizer, from files that hold our vocabulary."""
    return clip_specimens.load_transformers_tokenizer(tmp_path_factory.mktemp("tokenizer"))
