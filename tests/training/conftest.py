"""Lets the tests of this folder import `training_specimens`, and gives them a small model on disk."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import training_specimens


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Stable Diffusion with random weights, in diffusers' layout."""
    folder = tmp_path_factory.mktemp("model")
    training_specimens.small_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six captioned pictures."""
    return training_specimens.write_pictures(tmp_path_factory.mktemp("pictures"))
