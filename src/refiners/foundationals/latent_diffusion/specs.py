"""What makes one Stable Diffusion differ from another: the sizes of its parts, and how it was trained."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from refiners.foundationals.clip.text_encoder import CLIP_L, CLIPTextSpec
from refiners.foundationals.clip.tokenizer import VOCABULARY_PATH
from refiners.foundationals.latent_diffusion.autoencoder import SD1_AUTOENCODER, AutoencoderSpec
from refiners.foundationals.latent_diffusion.unet import SD1_UNET, UNetSpec
from refiners.solvers import SolverParams


@dataclass(frozen=True)
class StableDiffusionSpec:
    """The parts of a text-to-image model.

    default_size: side in pixels of the pictures it was trained on.
    condition_scale: of classifier-free guidance, where no other is asked for.
    solver_params: its training schedule, and what its UNet predicts.
    vocabulary: of its tokenizer, a file in the form of CLIP's own.
    """

    unet: UNetSpec = SD1_UNET
    autoencoder: AutoencoderSpec = SD1_AUTOENCODER
    text_encoder: CLIPTextSpec = CLIP_L
    solver_params: SolverParams = field(default_factory=SolverParams)
    default_size: int = 512
    condition_scale: float = 7.5
    vocabulary: Path = VOCABULARY_PATH

    def __post_init__(self) -> None:
        if self.unet.text_dim != self.text_encoder.embedding_dim:
            raise ValueError(
                f"the UNet reads text of width {self.unet.text_dim}, but the text encoder gives "
                f"{self.text_encoder.embedding_dim}; they must be the same"
            )


SD1 = StableDiffusionSpec()
SD1_INPAINTING = replace(SD1, unet=replace(SD1_UNET, in_channels=9))
