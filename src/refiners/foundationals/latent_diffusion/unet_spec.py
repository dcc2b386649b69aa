"""The sizes of the UNets of latent diffusion, and those of the released models."""

from dataclasses import dataclass, replace
from typing import Self

from refiners.weights.formats import TEXT_FAMILIES, Family


@dataclass(frozen=True)
class UNetSpec:
    """The sizes of a UNet.

    channels: width of each level, from full to lowest resolution; each level but the last ends with a halving.
    transformer_layers: how many transformer layers follow each residual block of a level; 0 for none.
    middle_layers: transformer layers of the middle block; None for as many as the lowest level with any has, or 1. With
        0 the middle is a single residual block, as in small ControlNets.
    num_heads: attention heads of each level.
    has_linear_projection: whether the transformers' projections are linear layers rather than 1x1 convolutions.
    position_frequencies: how many waves along each side tell a position where it lies; 0, as in Stable Diffusion: none.
    pooled_text_dim: width of a vector for the text as a whole, which is added to the time; 0 for none.
    num_time_ids: how many numbers, such as the size of the picture, are added to the time; 0 for none.
    time_id_waves: how many waves stand for each of them.
    guidance_waves: how many waves stand for the scale of guidance, in models that were distilled to need no second run
        for it (arXiv 2310.04378, section 4.2); 0 for models that need one.
    """

    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    transformer_layers: tuple[int, ...] = (1, 1, 1, 0)
    num_heads: tuple[int, ...] = (8, 8, 8, 8)
    blocks_per_level: int = 2
    text_dim: int = 768
    in_channels: int = 4
    out_channels: int = 4
    norm_groups: int = 32
    has_linear_projection: bool = False
    position_frequencies: int = 0
    pooled_text_dim: int = 0
    num_time_ids: int = 0
    time_id_waves: int = 256
    guidance_waves: int = 0
    middle_layers: int | None = None

    def __post_init__(self) -> None:
        sizes = {len(self.channels), len(self.transformer_layers), len(self.num_heads)}
        if len(sizes) != 1:
            raise ValueError(
                f"channels {self.channels}, transformer_layers {self.transformer_layers} and num_heads "
                f"{self.num_heads} must have one entry per level each"
            )
        if bool(self.pooled_text_dim) != bool(self.num_time_ids):
            raise ValueError(
                f"pooled_text_dim {self.pooled_text_dim} and num_time_ids {self.num_time_ids} go together: give both, "
                "or 0 for both"
            )

        if self.transformer_layers[-1] and self.num_middle_layers not in (0, self.transformer_layers[-1]):
            raise ValueError(
                f"middle_layers is {self.middle_layers}, but with {self.transformer_layers[-1]} transformer layers at "
                "the lowest level it can only be as many, or 0, as in diffusers"
            )

    def with_middle_layers(self, count: int) -> Self:
        """The same with so many transformer layers in the middle block."""
        usual = replace(self, middle_layers=None)
        return usual if usual.num_middle_layers == count else replace(self, middle_layers=count)

    @property
    def time_dim(self) -> int:
        """Width of the time embedding."""
        return 4 * self.channels[0]

    @property
    def family(self) -> Family | None:
        """Which models it is one of; None for unusual sizes."""
        return Family.SDXL if self.pooled_text_dim else TEXT_FAMILIES.get(self.text_dim)

    @property
    def conditions(self) -> tuple[str, ...]:
        """What the UNet reads besides the time step, by the names of `CONDITIONS`."""
        added = ("pooled_text_embedding", "time_ids") if self.pooled_text_dim else ()
        return ("clip_text_embedding", *added, *(("condition_scale",) if self.guidance_waves else ()))

    @property
    def num_middle_layers(self) -> int:
        """How many transformer layers the middle block has."""
        if self.middle_layers is not None:
            return self.middle_layers
        return next((layers for layers in reversed(self.transformer_layers) if layers), 1)

    @property
    def skip_channels(self) -> list[int]:
        """Width of each output that the way down leaves for the way up, in the order of the way down."""
        skips = [self.channels[0]]
        for level, width in enumerate(self.channels):
            skips += [width] * (self.blocks_per_level + (level < len(self.channels) - 1))
        return skips


SD1_UNET = UNetSpec()
SDXL_UNET = UNetSpec(
    channels=(320, 640, 1280),
    transformer_layers=(0, 2, 10),
    num_heads=(5, 10, 20),
    text_dim=2048,
    has_linear_projection=True,
    pooled_text_dim=1280,
    num_time_ids=6,
)
SDXL_REFINER_UNET = UNetSpec(
    channels=(384, 768, 1536, 1536),
    transformer_layers=(0, 4, 4, 0),
    num_heads=(6, 12, 24, 24),
    text_dim=1280,
    has_linear_projection=True,
    pooled_text_dim=1280,
    num_time_ids=5,
)
