"""Files of IP-Adapters: read, written, and told apart."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import IPAdapterPlusImageProjection
from ip_adapter_specimens import KINDS, SD1, features, ip_adapter, nested
from test_unet import inputs, pair, predict, reference
from torch import Tensor

import refiners.fluxion.layers as fl
from refiners.foundationals.latent_diffusion import UNet, UNetSpec
from refiners.foundationals.latent_diffusion.image_prompt import (
    ImageProjection,
    IPAdapter,
    PerceiverResampler,
    ResamplerSpec,
)
from refiners.foundationals.latent_diffusion.image_prompt.cross_attentions import find_cross_attentions
from refiners.foundationals.latent_diffusion.unet_spec import SD1_UNET, SDXL_UNET
from refiners.weights.formats import Content, Family, identify, identify_file

FULL_SIZES = {Family.SD1: SD1_UNET, Family.SDXL: SDXL_UNET}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["safetensors", "bin", "tensors"])
def test_what_is_saved_loads_and_does_the_same(kind: str, form: str, tmp_path: Path) -> None:
    unet, _ = pair(SD1)
    saved = ip_adapter(unet, kind)
    weights: Any = saved.tensors()
    if form == "safetensors":
        weights = tmp_path / "ip-adapter.safetensors"
        saved.save(weights)
    elif form == "bin":
        torch.save(nested(weights), tmp_path / "ip-adapter.bin")
        weights = tmp_path / "ip-adapter.bin"
    loaded = IPAdapter(unet, weights=weights)
    assert type(loaded.image_proj) is type(saved.image_proj)
    outputs: list[Tensor] = []
    for adapter in (saved, loaded):
        adapter.inject()
        with torch.no_grad():
            adapter.set_clip_image_embedding(adapter.embed_features(features(kind)))
            outputs.append(predict(unet, *inputs_of(SD1)))
        adapter.eject()
    assert all(torch.equal(tensor, saved.tensors()[name]) for name, tensor in loaded.tensors().items())
    assert torch.allclose(*outputs, atol=1e-5)
    if form != "tensors":
        assert identify_file(weights).content is Content.IP_ADAPTER


def inputs_of(spec: UNetSpec) -> Any:
    torch.manual_seed(3)
    return inputs(spec)


@pytest.mark.slow
@pytest.mark.parametrize("family", FULL_SIZES)
def test_every_key_of_the_full_size_has_the_number_and_shape_of_diffusers(family: Family) -> None:
    spec = FULL_SIZES[family]
    with torch.device("meta"):
        theirs = reference(spec)
    unet = UNet(spec, device="meta")
    ours = {name: tuple(tensor.shape) for name, tensor in IPAdapter(unet, fine_grained=True).tensors().items()}
    processors = [name.removesuffix(".processor") for name in theirs.attn_processors]
    modules, expected = dict(theirs.named_modules()), dict[str, tuple[int, ...]]()
    for number, name in enumerate(processors):  # the authors number all of them, of which they train every other one
        if name.endswith("attn2"):
            expected[f"ip_adapter.{number}.to_k_ip.weight"] = tuple(modules[name].to_k.weight.shape)
            expected[f"ip_adapter.{number}.to_v_ip.weight"] = tuple(modules[name].to_v.weight.shape)
    assert {name: shape for name, shape in ours.items() if name.startswith("ip_adapter.")} == expected
    found = [attention.place.names[0] for attention in find_cross_attentions(unet)]
    assert found == [name for name in processors if name.endswith("attn2")]
    assert identify(ours).family is family


@pytest.mark.parametrize(("text_dim", "inner_dim", "heads"), [(768, 768, 12), (2048, 1280, 20)], ids=["SD1", "SDXL"])
def test_a_new_plus_projection_has_the_sizes_of_the_published_ones(text_dim: int, inner_dim: int, heads: int) -> None:
    with torch.device("meta"):
        theirs = IPAdapterPlusImageProjection(1280, text_dim, inner_dim, heads=heads, num_queries=16)
        spec = ResamplerSpec(1280, text_dim, inner_dim, num_heads=heads, feedforward_dim=4 * inner_dim)
        ours = PerceiverResampler(spec)
    unet = UNet(UNetSpec((32,), (1,), (2,), text_dim=text_dim, norm_groups=8), device="meta")
    new = IPAdapter(unet, fine_grained=True).image_proj
    assert isinstance(new, PerceiverResampler) and new.spec == spec
    count = sum(parameter.numel() for parameter in theirs.parameters())
    assert sum(parameter.numel() for parameter in ours.parameters()) == count


def test_a_file_for_another_model_is_told_by_its_width() -> None:
    xl = ip_adapter(UNet(UNetSpec((32,), (1,), (2,), text_dim=2048, norm_groups=8)), "plain")
    with pytest.raises(ValueError, match=r"is for Stable Diffusion XL \(texts 2048 wide\), but the UNet is of a model"):
        IPAdapter(pair(SD1)[0], weights=xl.tensors())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ip_adapter.99.to_k_ip.weight": torch.zeros(2, 16)}, r"1 tensors have no place \(first: 'ip_adapter.99.to_k"),
        ({"ip_adapter.1.to_k_ip.weight": None}, r"1 are missing \(first: 'ip_adapter.1.to_k_ip.weight'\)"),
        ({"ip_adapter.1.to_k_ip.weight": torch.zeros(3, 16)}, r"is \(3, 16\) and should be \(32, 16\)"),
        ({"image_proj.norm.bias": torch.full((16,), float("nan"))}, "1 hold NaN"),
        ({"image_proj.proj.weight": None, "image_proj.proj.0.weight": torch.zeros(2, 2)}, r"faces \(FaceID\)"),
        (
            {"image_proj.latents": torch.zeros(1, 16, 16)},
            "'image_proj.proj_in.weight' should have 2 sizes, but it is missing",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(change: dict[str, Tensor | None], message: str) -> None:
    unet, _ = pair(SD1)
    before = list(unet.state_dict())
    tensors: dict[str, Any] = ip_adapter(unet).tensors() | change
    with pytest.raises(ValueError, match=message):
        IPAdapter(unet, weights={name: tensor for name, tensor in tensors.items() if tensor is not None})
    assert list(unet.state_dict()) == before


@pytest.mark.parametrize("kind", KINDS)
def test_any_tensor_that_is_missing_empty_or_of_another_shape_is_refused(kind: str) -> None:
    unet = UNet(UNetSpec((32,), (1,), (2,), text_dim=SD1.text_dim, norm_groups=8, blocks_per_level=1))
    tensors = ip_adapter(unet, kind).tensors()
    names = [name for name in tensors if "image_proj.layers" not in name or "layers.0" in name]
    for index, name in enumerate(names * 2):
        others = [None, torch.zeros(()), torch.zeros(0), torch.zeros(0, 3), tensors[name][None, None]]
        changed: dict[str, Any] = {**tensors, name: others[index % len(others)]}
        with pytest.raises(ValueError):
            IPAdapter(unet, weights={key: value for key, value in changed.items() if value is not None})


def test_a_number_in_a_name_asks_for_no_more_layers_than_there_are() -> None:
    unet, _ = pair(SD1)
    tensors = ip_adapter(unet, "plus").tensors() | {"image_proj.layers.999999999.1.0.weight": torch.ones(32)}
    with pytest.raises(ValueError, match="no place"):
        IPAdapter(unet, weights=tensors)


def test_what_is_no_ip_adapter_is_refused(tmp_path: Path) -> None:
    unet, _ = pair(SD1)
    with pytest.raises(ValueError, match=r"the tensors of the IP-Adapter: this is no IP-Adapter"):
        IPAdapter(unet, weights={"image_proj.proj.weight": torch.zeros(2, 2)})
    torch.save({"image_proj": {"a": torch.zeros(1)}, "ip_adapter": 3}, tmp_path / "x.bin")
    with pytest.raises(ValueError, match="'image_proj' is a dict"):
        IPAdapter(unet, weights=tmp_path / "x.bin")


def test_a_projection_of_ones_own_keeps_its_names() -> None:
    unet, _ = pair(SD1)
    saved = IPAdapter(unet, image_proj=Own(20, SD1.text_dim, num_tokens=2))
    tensors = saved.tensors()
    assert "image_proj.ImageProjection.Linear.weight" in tensors
    loaded = IPAdapter(unet, image_proj=Own(20, SD1.text_dim, num_tokens=2), weights=tensors)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in loaded.tensors().items())


class Own(fl.Chain):
    def __init__(self, image_dim: int, text_dim: int, num_tokens: int) -> None:
        super().__init__(ImageProjection(image_dim, text_dim, num_tokens))
