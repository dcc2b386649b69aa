"""An IP-Adapter in a tree: put in and taken out, copied, scaled, moved, compiled."""

import itertools
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from diffusion_specimens import small_model
from ip_adapter_specimens import SD1, features, ip_adapter
from PIL import Image
from test_unet import inputs, pair, predict
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.adapters.lora import LoraAdapter
from refiners.foundationals.latent_diffusion import StableDiffusion_1, UNet
from refiners.foundationals.latent_diffusion.image_prompt import ImageProjection, IPAdapter
from refiners.foundationals.latent_diffusion.image_prompt.attention import ImageAttention
from refiners.foundationals.latent_diffusion.image_prompt.cross_attentions import find_cross_attentions
from refiners.foundationals.latent_diffusion.lora.places import find_layers


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def ready(unet: UNet, kind: str = "plain", seed: int = 1, pictures: int = 1) -> IPAdapter:
    adapter = ip_adapter(unet, kind, seed).inject()
    adapter.set_clip_image_embedding(adapter.embed_features(features(kind, pictures, seed)))
    return adapter


def model_with_adapter() -> tuple[StableDiffusion_1, IPAdapter, Tensor, Tensor]:
    """With latents of two pictures and a text embedding."""
    model = small_model()
    torch.manual_seed(1)
    adapter = IPAdapter(model, image_proj=ImageProjection(20, 32)).inject()
    adapter.set_clip_image_embedding(adapter.embed_features(features("plain")))
    return model, adapter, torch.randn(2, 4, 8, 8), torch.randn(2, 77, 32)


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
def test_any_order_of_taking_adapters_out_restores_every_bit(order: tuple[int, ...]) -> None:
    unet, _ = pair(SD1)
    arguments = inputs(SD1)
    before, tensors = predict(unet, *arguments), {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    linear, parent = next(unet.DownBlocks.walk(nn.Linear))
    lora = LoraAdapter(linear, rank=2).inject(parent)
    nn.init.normal_(lora.loras["lora"].up.weight)
    adapters = [ready(unet), lora, ready(unet, "plus", seed=5)]
    assert tensors.keys() <= unet.state_dict().keys()
    outputs = [predict(unet, *arguments)]
    for index in order:
        adapters[index].eject()
        outputs.append(predict(unet, *arguments))
    assert all(not torch.allclose(one, other) for one, other in itertools.pairwise(outputs))
    assert torch.equal(outputs[-1], before)
    assert list(unet.state_dict()) == list(tensors)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in unet.state_dict().items())


def test_an_adapter_that_went_out_goes_in_again() -> None:
    unet, _ = pair(SD1)
    arguments = inputs(SD1)
    adapter, other = ready(unet), ready(unet, seed=5)
    both = predict(unet, *arguments)
    adapter.eject()
    other.set_scale(0)
    adapter.inject()
    other.set_scale(1)
    assert torch.allclose(predict(unet, *arguments), both, atol=1e-5)
    with pytest.raises(RuntimeError, match="injected already"):
        adapter.inject()
    adapter.eject()
    with pytest.raises(RuntimeError, match="not injected"):
        adapter.eject()


def test_a_copy_has_prompt_and_scale_of_its_own_and_lets_go_by_itself() -> None:
    unet, _ = pair(SD1)
    arguments = inputs(SD1)
    before = predict(unet, *arguments)
    adapter = ready(unet)
    adapted = predict(unet, *arguments)
    copy = unet.structural_copy()
    assert torch.equal(predict(copy, *arguments), adapted)
    copied = copy.layer("IPAdapter", IPAdapter)
    copied.scale = 0.5
    copied.set_clip_image_embedding(copied.embed_features(features("plain", seed=9)))
    assert torch.equal(predict(unet, *arguments), adapted) and adapter.scale == 1
    adapter.eject()
    assert torch.equal(predict(unet, *arguments), before)
    assert not torch.allclose(predict(copy, *arguments), before)
    copied.eject()
    assert torch.equal(predict(copy, *arguments), before)
    copied.inject()
    assert not torch.allclose(predict(copy, *arguments), before)
    assert torch.equal(predict(unet, *arguments), before)


def test_a_checkpoint_of_the_base_loads_under_the_adapter() -> None:
    unet, _ = pair(SD1)
    base = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    adapter = ready(unet)
    own = {name: tensor.clone() for name, tensor in adapter.tensors().items()}
    unet.load_state_dict({name: tensor + 1 for name, tensor in base.items()})
    assert all(torch.equal(unet.state_dict()[name], tensor + 1) for name, tensor in base.items())
    assert all(torch.equal(adapter.tensors()[name], tensor) for name, tensor in own.items())


def test_without_guidance_the_picture_still_counts_and_not_its_absence() -> None:
    model, _, x, text = model_with_adapter()
    guided = model.predict_noise(x, 0, text, condition_scale=2.0)
    alone = model.predict_noise(x, 0, text, condition_scale=1.0)
    almost = model.predict_noise(x, 0, text, condition_scale=1.0 + 1e-6)
    assert torch.allclose(alone, almost, atol=1e-4) and not torch.allclose(alone, guided, atol=1e-2)


def test_guidance_that_asks_again_gets_the_half_that_it_asks_for() -> None:
    model, _, x, text = model_with_adapter()
    seen: dict[str, Tensor] = {}

    def ask(prediction):
        seen["positive"] = prediction.again_positive(prediction.x) - prediction.positive
        seen["negative"] = prediction.again_unguided(prediction.x) - prediction.negative
        return torch.zeros_like(prediction.x)

    model.guidances.append(ask)
    model.predict_noise(x, 0, text, condition_scale=3.0)
    assert all(difference.abs().max() < 1e-4 for difference in seen.values())


def test_each_picture_of_a_batch_has_its_own_prompt_and_scale() -> None:
    model, adapter, x, text = model_with_adapter()
    both, scales = features("plain", pictures=2), (0.4, 1.7)
    adapter.set_clip_image_embedding(adapter.embed_features(both, concat_batches=False))
    adapter.scale = scales
    together = model.predict_noise(x, 0, text)
    for index, scale in enumerate(scales):
        adapter.scale = scale
        adapter.set_clip_image_embedding(adapter.embed_features(both[index : index + 1]))
        alone = model.predict_noise(x[index : index + 1], 0, text)
        assert torch.allclose(together[index : index + 1], alone, atol=1e-4)


def test_a_scale_may_depend_on_the_step() -> None:
    model, adapter, x, text = model_with_adapter()
    model.set_inference_steps(4)
    adapter.set_scale(lambda index, count: 1.0 if index < count / 2 else 0.25, blocks={"mid_block": 2})
    outputs = [model.predict_noise(x, step, text) for step in model.steps]
    expected: list[Tensor] = []
    for index, step in enumerate(model.steps):
        adapter.set_scale(1.0 if index < 2 else 0.25, blocks={"mid_block": 2})
        expected.append(model.predict_noise(x, step, text))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(outputs, expected, strict=True))


def test_scale_zero_is_the_model_without_it() -> None:
    model, adapter, x, text = model_with_adapter()
    adapter.scale = 0
    output = model.predict_noise(x, 0, text)
    adapter.eject()
    assert torch.allclose(output, model.predict_noise(x, 0, text), atol=1e-5)


def test_weights_of_pictures_multiply_their_tokens() -> None:
    unet, _ = pair(SD1)
    adapter, pictures = ip_adapter(unet), features("plain", pictures=2)
    negative, positive = adapter.embed_features(pictures, weights=[0.5, 2.0])
    first, second, nothing = (adapter.image_proj(each)[0] for each in (pictures[:1], pictures[1:], torch.zeros(1, 20)))
    assert torch.allclose(positive, torch.cat([0.5 * first, 2 * second]), atol=1e-5)
    assert torch.allclose(negative, torch.cat([nothing, nothing]), atol=1e-5)
    with pytest.raises(ValueError, match="weights of pictures should be 2 numbers"):
        adapter.embed_features(pictures, weights=[1.0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_moves_with_the_model_to_another_precision(dtype: torch.dtype) -> None:
    model, adapter, x, text = model_with_adapter()
    adapter.scale = 0.1
    adapter.set_masks([Image.new("L", (64, 64), 255)])
    expected = model.predict_noise(x, 0, text)
    model.to(dtype)
    assert {parameter.dtype for parameter in adapter.own_parameters()} == {dtype}
    assert adapter.attentions[0].image_attention.scaling.factor.item() == pytest.approx(0.1, abs=1e-8)
    adapter.image_proj.float()
    assert model.dtype == dtype
    adapter.set_clip_image_embedding(adapter.embed_features(features("plain")))
    output = model.predict_noise(x.to(dtype), 0, text.to(dtype)).float()
    assert output.dtype == torch.float32 and (output - expected).norm() / expected.norm() < 0.1


@pytest.mark.slow
def test_an_adapted_step_compiles_once_for_all_prompts_and_scales() -> None:
    model, adapter, x, text = model_with_adapter()
    eager = model.structural_copy()
    copied = eager.unet.layer("IPAdapter", IPAdapter)
    model.unet.compile(fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for index, scale in enumerate((1.0, 0.3, 0.0)):
            for each in (adapter, copied):
                each.scale = scale
                each.set_clip_image_embedding(each.embed_features(features("plain", seed=index)))
            step = model.steps[index]
            assert torch.allclose(model.predict_noise(x, step, text), eager.predict_noise(x, step, text), atol=1e-5)


def test_a_deep_copy_is_adapted_apart() -> None:
    unet, _ = pair(SD1)
    arguments = inputs(SD1)
    before = predict(unet, *arguments)
    adapter = ready(unet)
    adapted, copy = predict(unet, *arguments), deepcopy(unet)
    adapter.eject()
    assert torch.equal(predict(copy, *arguments), adapted)
    copy.layer("IPAdapter", IPAdapter).eject()
    assert torch.equal(predict(copy, *arguments), before)


def test_loras_and_files_see_the_layers_of_the_model_alone(tmp_path: Path) -> None:
    model, adapter, _, _ = model_with_adapter()
    model.save_pretrained(tmp_path / "adapted.safetensors")
    found = list(find_layers(model))
    adapter.eject()
    model.save_pretrained(tmp_path / "plain.safetensors")
    assert found == list(find_layers(model))
    assert (tmp_path / "adapted.safetensors").read_bytes() == (tmp_path / "plain.safetensors").read_bytes()


def test_a_new_one_starts_with_the_keys_and_values_of_the_text_in_copies() -> None:
    unet, _ = pair(SD1)
    base = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    linear, parent = next((each, up) for each, up in unet.DownBlocks.walk(nn.Linear) if isinstance(up, fl.Distribute))
    LoraAdapter(linear, rank=2).inject(parent)
    adapter = IPAdapter(unet, image_proj=ImageProjection(20, SD1.text_dim)).inject()
    for attention in find_cross_attentions(unet):
        distribute = attention.layer.Distribute
        keys, values = distribute.state_dict()["Linear_2.weight"], distribute.state_dict()["Linear_3.weight"]
        own = attention.layer.ensure_find(ImageAttention).Parallel.state_dict()
        assert torch.equal(own["TokenProjection_1.Linear.weight"], keys)
        assert torch.equal(own["TokenProjection_2.Linear.weight"], values)
    for parameter in adapter.own_parameters():
        parameter.zero_()
    assert all(torch.equal(unet.state_dict()[name], tensor) for name, tensor in base.items())


def test_another_image_encoder_serves_as_well() -> None:
    unet, _ = pair(SD1)
    encoder = fl.Chain(fl.Conv2d(3, 8, kernel_size=4, stride=4), fl.Flatten(1), fl.Linear(8 * 4, 6))
    adapter = IPAdapter(unet, encoder, ImageProjection(6, SD1.text_dim, num_tokens=2)).inject()
    pixels = torch.randn(1, 3, 8, 8)
    embedding = adapter.compute_clip_image_embedding(pixels)
    assert torch.equal(embedding, adapter.embed_features(encoder(pixels)))
    assert embedding.shape == (2, 2, SD1.text_dim) and not any("Conv2d" in name for name, _ in adapter.named_modules())
    with pytest.raises(ValueError, match="what is to come after a Chain cannot be told: give image_proj"):
        IPAdapter(unet, encoder)


def test_what_does_not_fit_is_said() -> None:
    model, adapter, x, text = model_with_adapter()
    with pytest.raises(ValueError, match=r"is \(2, T, 32\), but this one is \(2, 4, 16\)"):
        adapter.set_clip_image_embedding(torch.zeros(2, 4, 16))
    with pytest.raises(ValueError, match="has no image encoder"):
        adapter.compute_clip_image_embedding(torch.zeros(1, 20))
    with pytest.raises(ValueError, match=r"no layer of this adapter is in 'up_block'; did you mean 'up_blocks"):
        adapter.set_scale(1, blocks={"up_block": 0})
    with pytest.raises(ValueError, match="finite"):
        adapter.scale = float("nan")
    adapter.set_clip_image_embedding(torch.zeros(6, 4, 32))
    with pytest.raises(ValueError, match=r"2 pictures need IPAdapter.tokens of batch 4 .* but it is 6"):
        model.predict_noise(x, 0, text)
    fresh = IPAdapter(model, image_proj=ImageProjection(20, 32)).inject()
    with pytest.raises(ValueError, match="must be given an image prompt"):
        model.predict_noise(x, 0, text)
    fresh.eject()
