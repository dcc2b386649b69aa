"""The settings that all text-to-image recipes share."""

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from refiners.training.config import TrainerConfig
from refiners.training.settings import ConfigError, FileSetting, FolderSetting, PathSetting, Section, TextSetting

TAKEN_NAMES = ("cache", "checkpoints", "logs", "prior", "samples")  # what lies in a `save_folder` besides the result


def _result_name(name: str) -> str:
    if not name.strip() or name in TAKEN_NAMES or any(mark in "/.\\" or not mark.isprintable() for mark in name):
        raise ValueError(
            f"{name!r} names no result; give a word without dots and slashes that is none of {', '.join(TAKEN_NAMES)}"
        )
    return name


Probability = Annotated[float, Field(ge=0, le=1)]
ResultName = Annotated[str, AfterValidator(_result_name)]


class CheckpointFile(Section):
    """A safetensors file in the names of Refiners."""

    checkpoint: FileSetting


class ModelsConfig(Section):
    """The section `[models]`.

    base: what `StableDiffusion_1.from_pretrained` takes: a folder, a file or a repository of the hub; "builtin" is the
        small model that comes with the package.
    unet, lda, text_encoder: files whose weights replace those of `base`, as in `unet = {checkpoint = "a.safetensors"}`.
    dtype: of the weights that do not train.
    """

    base: TextSetting = "builtin"
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
    revision, split, image_column, caption_column: of `hf_repo`.
    resolution: side in pixels of a square of the same area, for Stable Diffusion 1 a multiple of 64; None for that of
        the model.
    max_aspect_ratio: of buckets; 1 crops every picture to a square.
    default_caption: for pictures that have none.
    on_bad_item: whether a picture that cannot be read or has no caption, or a caption without a picture, stops the
        training or is left out.
    mask_folder: grey pictures under the names of those in `folder`; the darker a place, the less it counts.
    conditioning_folder, conditioning_column: pictures that the model is to be led by, under the names of those in
        `folder`, or in a column of `hf_repo`; for recipes that train with such pictures.
    cache_folder: of latents and embeddings; None for `<save_folder>/cache`.
    held_out: how many pictures are kept from training, for a loss computed at each evaluation.
    """

    folder: PathSetting | None = None
    hf_repo: TextSetting | None = None
    scenes: ScenesConfig | None = None
    revision: TextSetting | None = None
    split: TextSetting = "train"
    image_column: TextSetting = "image"
    caption_column: TextSetting = "text"
    resolution: int | None = Field(default=None, ge=8)
    max_aspect_ratio: float = Field(default=2.0, ge=1, le=8)
    flip_probability: Probability = 0.0
    default_caption: str | None = None
    on_bad_item: Literal["stop", "skip"] = "stop"
    mask_folder: PathSetting | None = None
    conditioning_folder: PathSetting | None = None
    conditioning_column: TextSetting | None = None
    cache_folder: FolderSetting | None = None
    held_out: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _has_one_source(self) -> "DatasetConfig":
        if sum(source is not None for source in (self.folder, self.hf_repo, self.scenes)) != 1:
            raise ValueError("[dataset] needs one of `folder`, `hf_repo` and `scenes`, and not two of them")
        return self

    @model_validator(mode="after")
    def _source_has_them(self) -> "DatasetConfig":
        of_hub = ("revision", "split", "image_column", "caption_column", "conditioning_column")
        sources = {"mask_folder": "folder", "conditioning_folder": "folder", **dict.fromkeys(of_hub, "hf_repo")}
        for name, source in sources.items():
            value = getattr(self, name)
            if value != type(self).model_fields[name].default and getattr(self, source) is None:
                given = next(each for each in ("folder", "hf_repo", "scenes") if getattr(self, each) is not None)
                raise ValueError(
                    f"{name} = {str(value)!r} is for data from `{source}`, but these come from `{given}`; leave it out"
                )
        return self


class LatentDiffusionConfig(Section):
    """The section `[latent_diffusion]`.

    unconditional_sampling_probability: how often a caption is left out, for classifier-free guidance.
    offset_noise: strength of noise that is the same over all of a picture.
    prediction_type, zero_terminal_snr: None for what the model was trained with.
    first_timestep, end_timestep: the range to draw from, 0 the cleanest; `end_timestep` itself is never drawn. None for
        as many as the model has.
    """

    unconditional_sampling_probability: Probability = 0.0
    offset_noise: float = Field(default=0.0, ge=0, le=1)
    min_snr_gamma: float | None = Field(default=None, gt=0)
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None
    zero_terminal_snr: bool | None = None
    first_timestep: int = Field(default=0, ge=0)
    end_timestep: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _has_timesteps(self) -> "LatentDiffusionConfig":
        if self.end_timestep is not None and self.first_timestep >= self.end_timestep:
            raise ValueError(
                f"first_timestep = {self.first_timestep} should be below end_timestep = {self.end_timestep}"
            )
        return self

    @model_validator(mode="after")
    def _last_timestep_teaches(self) -> "LatentDiffusionConfig":
        if self.prediction_type == "epsilon" and self.zero_terminal_snr:
            raise ValueError(
                'prediction_type = "epsilon" and zero_terminal_snr = true exclude each other: telling noise where '
                'there is nothing else teaches nothing; set prediction_type = "v_prediction"'
            )
        return self

    def timesteps_of(self, count: int) -> tuple[int, int]:
        """The first timestep and the end, for a model that has `count`. Raises ConfigError if it has none of these."""
        for name, least in (("first_timestep", self.first_timestep + 1), ("end_timestep", self.end_timestep or 1)):
            if least > count:
                raise ConfigError(
                    f"latent_diffusion.{name} = {getattr(self, name)} is beyond the {count} timesteps of this model"
                )
        return self.first_timestep, count if self.end_timestep is None else self.end_timestep


class DiffusionTestConfig(Section):
    """The section `[test_diffusion]`.

    Pictures made at each evaluation, to look at; in `<save_folder>/samples`.

    conditioning: a picture for each prompt, for recipes that train with such pictures.
    """

    prompts: list[str] = Field(default_factory=list[str])
    conditioning: list[FileSetting] = Field(default_factory=list[FileSetting])
    num_inference_steps: int = Field(default=20, ge=1, le=1000)
    condition_scale: float = Field(default=7.5, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**63)


class TextToImageConfig(TrainerConfig):
    """What every text-to-image recipe needs.

    IS_LED: whether the recipe trains with pictures that the model is led by.
    USES_CAPTIONS: whether it trains with the captions of the data set.
    """

    IS_LED: ClassVar[bool] = False
    USES_CAPTIONS: ClassVar[bool] = True
    models: ModelsConfig = ModelsConfig()
    dataset: DatasetConfig
    latent_diffusion: LatentDiffusionConfig = LatentDiffusionConfig()
    test_diffusion: DiffusionTestConfig = DiffusionTestConfig()

    @property
    def trains_text_encoder(self) -> bool:
        """Whether anything in the text encoder trains."""
        return False

    @model_validator(mode="after")
    def _recipe_trains_text(self) -> "TextToImageConfig":
        rate = self.optimizer.text_encoder_learning_rate
        if rate is not None and not self.trains_text_encoder:
            raise ValueError(
                f"optimizer.text_encoder_learning_rate = {rate}, but nothing in the text encoder trains; choose what "
                "should train there, or leave the rate out"
            )
        if self.dataset.default_caption is not None and not self.USES_CAPTIONS:
            raise ValueError(
                f"dataset.default_caption = {self.dataset.default_caption!r} would not be used: this recipe makes its "
                "own captions; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _evaluates_at_all(self) -> "TextToImageConfig":
        scenes = self.dataset.scenes
        asked = {
            "dataset.held_out": self.dataset.held_out,
            "dataset.scenes.judged": scenes.judged if scenes else 0,
            "test_diffusion.prompts": len(self.test_diffusion.prompts),
        }
        for name, count in asked.items():
            if count and self.training.evaluation_interval is None:
                raise ValueError(
                    f"{name} is for evaluations, but there are none; set training.evaluation_interval, or leave it out"
                )
        return self

    @model_validator(mode="after")
    def _is_led_if_asked(self) -> "TextToImageConfig":
        wanted, given = len(self.test_diffusion.prompts) if self.IS_LED else 0, len(self.test_diffusion.conditioning)
        if given != wanted:
            raise ValueError(
                f"test_diffusion.conditioning names {given} pictures, but this recipe needs {wanted}: one for each "
                "prompt if it trains with such pictures, else none"
            )
        if self.dataset.scenes is not None and self.dataset.scenes.judged and not self.IS_LED:
            raise ValueError("dataset.scenes.judged is for recipes whose adapter is led by pictures; set it to 0")
        if self.dataset.conditioning_column is not None and not self.IS_LED:
            raise ValueError("dataset.conditioning_column is for recipes that train with such pictures; leave it out")
        return self
