"""Small files for the tests of the command line, and the way to import what they share."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "foundationals" / "latent_diffusion"))
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusion_specimens import small_folder

    return small_folder(tmp_path_factory.mktemp("cli") / "sd")


@pytest.fixture(scope="session")
def lora(folder: Path) -> Path:
    from cli_specimens import write_lora

    return write_lora(folder.parent / "style.safetensors", folder)
