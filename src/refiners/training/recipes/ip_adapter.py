"""Recipe `ip_adapter`: trains an IP-Adapter, by which a UNet reads pictures as it reads a text (arXiv 2308.06721)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

import refiners.fluxion.layers as fl
from refiners.foundationals.clip.image_encoder_names import load_clip_image_encoder
from refiners.foundationals.latent_diffusion import StableDiffusion_1
from refiners.foundationals.latent_diffusion.image_prompt import ImageProjection, IPAdapter
from refiners.foundationals.latent_diffusion.image_prompt.attention import TokenProjection
from refiners.foundationals.latent_diffusion.image_prompt.cross_attentions import find_cross_attentions
from refiners.foundationals.scenes.reader import load_image_encoder
from refiners.training.data.cache import fingerprint
from refiners.training.data.latents import Conditioning
from refiners.training.distributed import Process
from refiners.training.recipes.config import Probability, ResultName
from refiners.training.recipes.leading import Lead, LeadConfig
from refiners.training.recipes.text_to_image import Choice, load_model, read_pictures, train
from refiners.training.settings import Section, TextSetting
from refiners.training.trainer import Trainer


class IPAdapterConfig(Section):
    """The section `[ip_adapter]`.

    Pictures are prompted with themselves, or with the pictures of `dataset.conditioning_folder`.

    image_encoder: a file or folder of CLIP's with transformers' names; "builtin" is the one of the embedded model.
    tokens: how many stand for a picture.
    image_drop_probability: how often, in training, a picture is left out, so that there is a prediction without any to
        be guided away from.
    name: of the result, `<save_folder>/<name>.safetensors`, which Refiners, diffusers and others load.
    """

    image_encoder: TextSetting = "builtin"
    tokens: int = Field(default=4, ge=1)
    image_drop_probability: Probability = 0.0
    name: ResultName = "ip-adapter"


class IPAdapterTrainingConfig(LeadConfig):
    """The settings of recipe `ip_adapter`."""

    recipe: Literal["ip_adapter"] = "ip_adapter"
    ip_adapter: IPAdapterConfig = IPAdapterConfig()


def inject_ip_adapter(sd: StableDiffusion_1, config: IPAdapterConfig) -> Choice:
    """Put a new IP-Adapter onto the UNet."""
    encoder = _load_encoder(config.image_encoder, sd)
    projection = ImageProjection(_width_of(encoder), sd.unet.spec.text_dim, config.tokens)
    adapter = IPAdapter(sd, encoder, projection).inject()
    _start_from_text(adapter)
    for parameter in adapter.own_parameters():
        parameter.data = parameter.data.float()  # whatever the UNet is in: small changes must not get lost

    def lead(features: Tensor) -> None:
        _, embedding = adapter.embed_features(features, concat_batches=False).chunk(2)
        adapter.set_clip_image_embedding(embedding)

    def show(pictures: Sequence[Image.Image]) -> None:
        adapter.set_clip_image_embedding(adapter.compute_clip_image_embedding(pictures, concat_batches=False))

    def save(folder: Path) -> Path:
        path = folder / f"{config.name}.safetensors"
        adapter.save(path)
        return path

    @torch.no_grad()
    def prepare(image: Image.Image) -> Tensor:
        return encoder([image])[0].float()

    conditioning = Conditioning(prepare, mark=f"{encoder!r} {fingerprint(encoder)}", is_its_own=True)
    return Choice(
        models={},
        parameters={str(number): parameter for number, parameter in enumerate(adapter.own_parameters())},
        save=save,
        lead=Lead(conditioning, lead, show, config.image_drop_probability),
        blocks=[layer for layer in adapter.image_proj.modules() if [*layer.parameters(recurse=False)]],
    )


def _start_from_text(adapter: IPAdapter) -> None:
    """Let the keys and values of pictures be those of texts at first, as in the authors' code."""
    for attention, added in zip(find_cross_attentions(adapter.target), adapter.attentions, strict=True):
        _, *of_text = attention.layer.layer("Distribute", fl.Distribute)
        of_picture = [projection.layer("Linear", fl.Linear) for projection in added.layers(TokenProjection)]
        for ours, theirs in zip(of_picture, of_text, strict=True):
            ours.load_state_dict(theirs.state_dict())


def _load_encoder(where: str, sd: StableDiffusion_1) -> fl.Chain:
    if where == "builtin":
        return load_image_encoder()
    return load_clip_image_encoder(where, device=sd.device, dtype=sd.dtype).requires_grad_(False)


@torch.no_grad()
def _width_of(encoder: fl.Chain) -> int:
    """Of what an encoder makes of a picture."""
    return encoder([Image.new("RGB", (32, 32))]).shape[-1]


def run(config: IPAdapterTrainingConfig, process: Process) -> Trainer:
    """Train as the config says."""
    pictures = read_pictures(config)
    sd = load_model(config, process)
    return train(config, sd, pictures, inject_ip_adapter(sd, config.ip_adapter), process)
