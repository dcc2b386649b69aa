"""What makes one Stable Diffusion differ from another: the sizes of its parts, and how it was trained."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from refiners.foundationals.clip.double_text_encoder import ENCODER_PATHS
from refiners.foundationals.clip.text_encoder import CLIP_L, SDXL_CLIP_G, SDXL_CLIP_L, CLIPTextSpec
from refiners.foundationals.clip.tokenizer import VOCABULARY_PATH
from refiners.foundationals.latent_diffusion.autoencoder import SD1_AUTOENCODER, SDXL_AUTOENCODER, AutoencoderSpec
from refiners.foundationals.latent_diffusion.unet_spec import SD1_UNET, SDXL_REFINER_UNET, SDXL_UNET, UNetSpec
from refiners.solvers import SolverParams
from refiners.weights.formats import Family


@dataclass(frozen=True)
class StableDiffusionSpec:
    """The parts of a text-to-image model.

    text_encoder, text_encoder_2: the second gives a vector for the text as a whole besides. One of them may be None.
    default_size: side in pixels of the pictures it was trained on.
    condition_scale: of classifier-free guidance, where no other is asked for.
    solver_params: its training schedule, and what its UNet predicts.
    vocabulary: of its tokenizers, a file in the form of CLIP's own.
    """

    unet: UNetSpec = SD1_UNET
    autoencoder: AutoencoderSpec = SD1_AUTOENCODER
    text_encoder: CLIPTextSpec | None = CLIP_L
    text_encoder_2: CLIPTextSpec | None = None
    solver_params: SolverParams = field(default_factory=SolverParams)
    default_size: int = 512
    condition_scale: float = 7.5
    vocabulary: Path = VOCABULARY_PATH

    def __post_init__(self) -> None:
        text_dim = sum(text.embedding_dim for text in self.text_encoders.values())
        pooled_dim = self.text_encoder_2.projection_dim if self.text_encoder_2 else 0
        for what, wanted, given in (
            ("text", self.unet.text_dim, text_dim),
            ("pooled text", self.unet.pooled_text_dim, pooled_dim),
        ):
            if wanted != given:
                raise ValueError(
                    f"the UNet reads {what} of width {wanted}, but the text encoder gives {given}; they must be the "
                    "same"
                )

    @property
    def text_encoders(self) -> dict[str, CLIPTextSpec]:
        """Those that there are, by diffusers' names of them."""
        both = {"text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}
        return {name: text for name, text in both.items() if text is not None}

    @property
    def text_encoder_paths(self) -> dict[str, str]:
        """Where each of them sits in the tree `clip_text_encoder`; "" for a lone one, which is the tree."""
        if len(self.text_encoders) == 1:
            return dict.fromkeys(self.text_encoders, "")
        return dict(zip(self.text_encoders, ENCODER_PATHS, strict=True))

    @property
    def family(self) -> Family:
        """Which models it is one of."""
        return Family.SD1 if self.text_encoder_2 is None else Family.SDXL

    @property
    def is_inpainting(self) -> bool:
        """Whether the UNet also sees a mask, and what is outside of it."""
        return self.unet.in_channels == 2 * self.autoencoder.latent_channels + 1

    def is_like(self, other: "StableDiffusionSpec") -> bool:
        """Whether one class holds models of both, as they differ by sizes alone."""
        is_same_text = self.text_encoders.keys() == other.text_encoders.keys()
        return is_same_text and self.is_inpainting == other.is_inpainting


SD1 = StableDiffusionSpec()
SD1_INPAINTING = replace(SD1, unet=replace(SD1_UNET, in_channels=9))
SDXL = StableDiffusionSpec(
    unet=SDXL_UNET,
    autoencoder=SDXL_AUTOENCODER,
    text_encoder=SDXL_CLIP_L,
    text_encoder_2=SDXL_CLIP_G,
    default_size=1024,
    condition_scale=5.0,
)
SDXL_INPAINTING = replace(SDXL, unet=replace(SDXL_UNET, in_channels=9))
SDXL_REFINER = replace(SDXL, unet=SDXL_REFINER_UNET, text_encoder=None)
