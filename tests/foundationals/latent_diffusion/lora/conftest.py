"""What the tests of LoRA files share: a small model of ours beside diffusers' pipeline of the same weights."""

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from lora_specimens import Models, load_both, load_ours

from refiners.foundationals.latent_diffusion import StableDiffusion_1

sys.path.insert(0, str(Path(__file__).parent))
with warnings.catch_warnings():  # what others deprecate is not ours to fix
    warnings.simplefilter("ignore")
    import peft  # noqa: F401  # only its first import warns


@pytest.fixture(scope="session", autouse=True)
def old_peft() -> Iterator[None]:
    """transformers asks for a newer peft than there is here; what is used of it is in this one too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.20.0")
        yield


@pytest.fixture
def models() -> Models:
    """Ours and theirs, to be changed at will."""
    return load_both()


@pytest.fixture
def sd(models: Models) -> StableDiffusion_1:
    """All of ours, to be changed at will."""
    whole = load_ours()
    return StableDiffusion_1(models[0].unet, whole.lda, models[0].clip_text_encoder, spec=whole.spec)
