"""What all text-to-image recipes do: load a model, read and cache pictures, train what the recipe chose, save it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from refiners.fluxion.utils import manual_seed
from refiners.foundationals.clip import text_encoder
from refiners.foundationals.latent_diffusion import StableDiffusion_1
from refiners.foundationals.latent_diffusion.unet import ResidualBlock, TransformerLayer
from refiners.solvers import ModelPredictionType, SolverParams
from refiners.training.data.buckets import bucket_sizes
from refiners.training.data.cache import TensorCache, fingerprint, key_of
from refiners.training.data.captions import CaptionRule
from refiners.training.data.latents import DiffusionBatch, Item, LatentBatches, LatentCache, SampleRule
from refiners.training.data.pictures import Picture, read_folder, read_hub, with_captions
from refiners.training.data.scenes import draw_pictures
from refiners.training.distributed import Process
from refiners.training.losses import DiffusionLoss
from refiners.training.recipes.config import TextToImageConfig
from refiners.training.recipes.judging import JudgeScenes
from refiners.training.recipes.leading import Lead
from refiners.training.recipes.samples import SaveResult, SaveSamples
from refiners.training.recomputation import recompute
from refiners.training.reporting import make_reporters, note
from refiners.training.settings import ConfigError
from refiners.training.trainer import Callback, Trainer

BLOCKS = (ResidualBlock, TransformerLayer, text_encoder.TransformerLayer)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Choice:
    """What a recipe trains.

    models: the trees that hold it, by name: "unet" or "text_encoder".
    parameters: what trains.
    save: writes the result, to be used, and returns where it is.
    trains_text: whether text embeddings change in training, so that they cannot be cached.
    lead: what the model is led by besides the text.
    blocks: modules that run by themselves, outside of the forward passes of their trees: FSDP has to know them.
    """

    models: dict[str, nn.Module]
    parameters: dict[str, nn.Parameter]
    save: Callable[[Path], Path]
    trains_text: bool = False
    captions: CaptionRule = field(default_factory=CaptionRule)
    saves_often: bool = True
    lead: Lead | None = None
    blocks: Sequence[nn.Module] = ()


def load_model(config: TextToImageConfig, process: Process) -> StableDiffusion_1:
    """The model that is to be trained, on the device of this process."""
    models = config.models
    sd = StableDiffusion_1.from_pretrained(models.base, device=process.device, dtype=DTYPES[models.dtype])
    for tree, file in ((sd.unet, models.unet), (sd.lda, models.lda), (sd.clip_text_encoder, models.text_encoder)):
        if file is not None:
            tree.load_from_safetensors(file.checkpoint)
    manual_seed(config.training.seed)  # what adapters start from
    return sd


def read_pictures(config: TextToImageConfig) -> list[Picture]:
    """The pictures of the config's data set that have captions."""
    dataset = config.dataset
    if dataset.scenes is not None:
        pictures = draw_pictures(dataset.scenes.count, dataset.scenes.conditioning, dataset.scenes.seed)
    elif dataset.folder is not None:
        pictures = read_folder(dataset.folder, dataset.on_bad_item, dataset.mask_folder, dataset.conditioning_folder)
    else:
        assert dataset.hf_repo is not None
        columns = (dataset.image_column, dataset.caption_column, dataset.conditioning_column)
        pictures = read_hub(dataset.hf_repo, dataset.split, dataset.revision, *columns)
    return with_captions(pictures, dataset.on_bad_item, dataset.default_caption)


def train(
    config: TextToImageConfig,
    sd: StableDiffusion_1,
    pictures: Sequence[Picture],
    choice: Choice,
    process: Process,
    callbacks: Sequence[Callback] = (),
) -> Trainer:
    """Train what a recipe chose on pictures with captions, and save it."""
    loss, reporters = _make_loss(config, sd), make_reporters(config, process)
    first_timestep, end_timestep = config.latent_diffusion.timesteps_of(loss.params.num_train_timesteps)
    dropped = config.latent_diffusion.unconditional_sampling_probability
    captions = replace(choice.captions, drop_probability=dropped)
    items = _prepare_items(config, sd, pictures, process, choice.lead)
    held_out, items = _split(items, config.dataset.held_out)
    encode_text = None if choice.trains_text else _text_cache(config, sd, [*items, *held_out], captions, process)
    rule = SampleRule(
        seed=config.training.seed,
        first_timestep=first_timestep,
        end_timestep=end_timestep,
        offset_noise=config.latent_diffusion.offset_noise,
        flip_probability=config.dataset.flip_probability,
        conditioning_drop_probability=choice.lead.drop_probability if choice.lead else 0.0,
        captions=captions,
    )
    test_rule = replace(
        rule,
        seed=config.training.evaluation_seed,
        flip_probability=0.0,
        conditioning_drop_probability=0.0,
        captions=choice.captions,
    )
    size = config.training.batch_size
    models = {"unet": sd.unet, **choice.models}  # the UNet in any case: gradients go through it
    blocks = [module for model in models.values() for module in model.modules() if isinstance(module, BLOCKS)]
    if config.training.gradient_checkpointing:
        holders = [model for model in models.values() if not set(blocks).isdisjoint(model.modules())]
        blocks = [block for model in holders for block in recompute(model, BLOCKS)]
    trainer = Trainer(
        models,
        make_objective(sd, loss, choice.lead),
        LatentBatches(items, size, rule, encode_text),
        config,
        trained=choice.parameters,
        held_out=LatentBatches(held_out, size, test_rule, encode_text) if held_out else None,
        callbacks=[
            *reporters,
            SaveSamples(sd, config.test_diffusion, choice.lead),
            *([JudgeScenes(sd, config, choice.lead)] if choice.lead and config.dataset.scenes else []),
            SaveResult(choice.save, choice.saves_often),
            *callbacks,
        ],
        process=process,
        blocks=[*blocks, *choice.blocks],
    )
    trainer.train()
    return trainer


def make_objective(
    sd: StableDiffusion_1, loss: DiffusionLoss, lead: Lead | None = None
) -> Callable[[DiffusionBatch], Tensor]:
    """The mean loss of a batch: how well the UNet tells what it should."""

    def compute_loss(batch: DiffusionBatch) -> Tensor:
        batch = batch.to(sd.device)
        text: Tensor = sd.clip_text_encoder(batch.texts) if batch.embeddings is None else batch.embeddings
        if lead is not None:
            assert batch.conditioning is not None
            lead.set(batch.conditioning)
        noisy = loss.add_noise(batch.latents, batch.noise, batch.timesteps)
        sd.unet.set_timestep(batch.timesteps)
        sd.unet.set_clip_text_embedding(text.to(sd.dtype))
        predicted: Tensor = sd.unet(noisy.to(sd.dtype))
        wanted = loss.target(batch.latents, batch.noise, batch.timesteps)
        return (loss(predicted, wanted, batch.timesteps, batch.masks) * batch.weights).mean()

    return compute_loss


def _make_loss(config: TextToImageConfig, sd: StableDiffusion_1) -> DiffusionLoss:
    settings, params = config.latent_diffusion, sd.spec.solver_params
    changes: dict[str, object] = {}
    if settings.prediction_type is not None:
        changes["model_prediction_type"] = ModelPredictionType(settings.prediction_type)
    if settings.zero_terminal_snr is not None:
        changes["rescale_to_zero_terminal_snr"] = settings.zero_terminal_snr
    changed: SolverParams = replace(params, **changes)
    return DiffusionLoss(changed, settings.min_snr_gamma)


def _prepare_items(
    config: TextToImageConfig,
    sd: StableDiffusion_1,
    pictures: Sequence[Picture],
    process: Process,
    lead: Lead | None,
) -> list[Item]:
    """Latents of all pictures. Each process works out its share, then all read all."""
    dataset, factor = config.dataset, sd.lda.spec.downsampling_factor
    multiple = factor * 2 ** (len(sd.unet.spec.channels) - 1)
    resolution = dataset.resolution or sd.spec.default_size
    if dataset.resolution is not None and resolution % multiple:
        raise ConfigError(
            f"dataset.resolution = {resolution} is no multiple of {multiple}, as this model needs; set it to "
            f"{max(multiple, round(resolution / multiple) * multiple)}"
        )
    sizes = bucket_sizes(resolution, multiple, dataset.max_aspect_ratio)

    @torch.no_grad()
    def encode(pixels: Tensor) -> Tensor:
        return sd.lda.encode(pixels.to(sd.device, sd.dtype))

    cache = TensorCache(_cache_folder(config) / "latents")
    has_flips, conditioning = dataset.flip_probability > 0, lead and lead.conditioning
    latents = LatentCache(cache, encode, fingerprint(sd.lda), sizes, factor, has_flips, conditioning)
    if process.count > 1:
        latents.fill(pictures[process.rank :: process.count])
        process.wait()
    show = note("latents", process)
    return latents.items(pictures, dataset.on_bad_item, show)


def _text_cache(
    config: TextToImageConfig, sd: StableDiffusion_1, items: Sequence[Item], rule: CaptionRule, process: Process
) -> Callable[[str], Tensor]:
    """Embeds a text from the cache, into which all texts of the items go first."""
    cache, encoder = TensorCache(_cache_folder(config) / "texts"), sd.clip_text_encoder
    mark = fingerprint(encoder)

    @torch.no_grad()
    def make(text: str) -> dict[str, Tensor]:
        return {"embedding": encoder(text)[0].float()}

    def embed(text: str) -> Tensor:
        return cache.get(key_of(text, mark), lambda: make(text))["embedding"]

    texts = sorted({text for item in items for text in rule.all_for(item.caption)})
    show = note("texts", process)
    for number, text in enumerate(texts, start=1):
        embed(text)
        show(number, len(texts))
    return embed


def _split(items: Sequence[Item], count: int) -> tuple[list[Item], list[Item]]:
    """Some items held out, and the others; which ones depends on their content alone."""
    if count >= len(items):
        raise ConfigError(f"dataset.held_out = {count} leaves none of the {len(items)} pictures to train on; lower it")
    order = sorted(range(len(items)), key=lambda index: (items[index].key, index))
    chosen = set(order[:count])
    return [items[index] for index in order[:count]], [item for index, item in enumerate(items) if index not in chosen]


def _cache_folder(config: TextToImageConfig) -> Path:
    return config.dataset.cache_folder or config.checkpointing.save_folder / "cache"


def parameters_of(trees: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """All parameters of some trees, by name."""
    return {f"{key}.{name}": parameter for key, tree in trees.items() for name, parameter in tree.named_parameters()}
