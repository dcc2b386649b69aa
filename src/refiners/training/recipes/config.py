"""The settings that all text-to-image recipes share."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from refiners.training.config import TrainerConfig
from refiners.training.settings import Section

Probability = Field(default=0.0, ge=0, le=1)


class CheckpointFile(Section):
    """A safetensors file in the names of Refiners."""

    checkpoint: Path


class ModelsConfig(Section):
    """The section `[models]`.

    base: what `StableDiffusion_1.from_pretrained` takes: a folder, a file or a repository of the hub; "builtin" is the
        small model that comes with the package.
    unet, lda, text_encoder: files whose weights replace those of `base`, as in `unet = {checkpoint = "a.safetensors"}`.
    dtype: of the weights that do not train.
    """

    base: str = "builtin"
    unet: CheckpointFile | None = None
    lda: CheckpointFile | None = None
    text_encoder: CheckpointFile | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class ScenesConfig(Section):
    """The section `[dataset.scenes]`.

    Scenes to train on, drawn rather than read: what the embedded model knows.

    count: how many.
    conditioning: what comes with each, a name in `refiners.foundationals.scenes.controls.CONTROLS`.
    judged: how many scenes of kinds that are held out from training are drawn by the model at each evaluation, to log
        how many of them the reader finds as they should be.
    """

    count: int = Field(default=4000, ge=1)
    conditioning: Literal["edges", "classes", "boxes", "thing"] = "edges"
    seed: int = Field(default=0, ge=0, lt=2**63)
    judged: int = Field(default=0, ge=0)


class DatasetConfig(Section):
    """The section `[dataset]`.

    folder: of pictures with captions, see `refiners.training.data.pictures`. Or else:
    hf_repo: a data set of the hub, of which `revision`, `split` and the columns can be named. Or else:
    scenes: see there.
    resolution: side in pixels of a square of the same area; None for that of the model.
    max_aspect_ratio: of buckets; 1 crops every picture to a square.
    default_caption: for pictures that have none.
    on_bad_item: whether a picture that cannot be read or has no caption, or a caption without a picture, stops the
        training or is left out.
    mask_folder: grey pictures under the names of the pictures; the darker a place, the less it counts.
    conditioning_folder, conditioning_column: pictures that the model is to be led by, under the names of the pictures,
        or in a column of the data set; for recipes that train with such pictures.
    cache_folder: of latents and embeddings; None for `<save_folder>/cache`.
    held_out: how many pictures are kept from training, for a loss computed at each evaluation.
    """

    folder: Path | None = None
    hf_repo: str | None = None
    scenes: ScenesConfig | None = None
    revision: str | None = None
    split: str = "train"
    image_column: str = "image"
    caption_column: str = "text"
    resolution: int | None = Field(default=None, ge=8)
    max_aspect_ratio: float = Field(default=2.0, ge=1, le=8)
    flip_probability: float = Probability
    default_caption: str | None = None
    on_bad_item: Literal["stop", "skip"] = "stop"
    mask_folder: Path | None = None
    conditioning_folder: Path | None = None
    conditioning_column: str | None = None
    cache_folder: Path | None = None
    held_out: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _has_one_source(self) -> "DatasetConfig":
        if sum(source is not None for source in (self.folder, self.hf_repo, self.scenes)) != 1:
            raise ValueError("[dataset] needs one of `folder`, `hf_repo` and `scenes`, and not two of them")
        return self


class LatentDiffusionConfig(Section):
    """The section `[latent_diffusion]`.

    unconditional_sampling_probability: how often a caption is left out, for classifier-free guidance.
    offset_noise: strength of noise that is the same over all of a picture.
    prediction_type, zero_terminal_snr: None for what the model was trained with.
    first_timestep, end_timestep: the range to draw from, 0 the cleanest; `end_timestep` itself is never drawn.
    """

    unconditional_sampling_probability: float = Probability
    offset_noise: float = Field(default=0.0, ge=0, le=1)
    min_snr_gamma: float | None = Field(default=None, gt=0)
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None
    zero_terminal_snr: bool | None = None
    first_timestep: int = Field(default=0, ge=0)
    end_timestep: int = Field(default=1000, ge=1)

    @model_validator(mode="after")
    def _has_timesteps(self) -> "LatentDiffusionConfig":
        if self.first_timestep >= self.end_timestep:
            raise ValueError(
                f"first_timestep = {self.first_timestep} should be below end_timestep = {self.end_timestep}"
            )
        return self


class DiffusionTestConfig(Section):
    """The section `[test_diffusion]`.

    Pictures made at each evaluation, to look at; in `<save_folder>/samples`.

    conditioning: a picture for each prompt, for recipes that train with such pictures.
    """

    prompts: list[str] = Field(default_factory=list[str])
    conditioning: list[Path] = Field(default_factory=list[Path])
    num_inference_steps: int = Field(default=20, ge=1, le=1000)
    condition_scale: float = Field(default=7.5, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**63)


class TextToImageConfig(TrainerConfig):
    """What every text-to-image recipe needs."""

    models: ModelsConfig = ModelsConfig()
    dataset: DatasetConfig
    latent_diffusion: LatentDiffusionConfig = LatentDiffusionConfig()
    test_diffusion: DiffusionTestConfig = DiffusionTestConfig()
