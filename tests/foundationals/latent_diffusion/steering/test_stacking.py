"""Edits that steer sampling, and LoRAs, on one model: in any order, at once, and off again without a trace."""

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusion_specimens import randomize, small_model
from steering_specimens import relative_error
from test_steps import live_bytes
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

import refiners.fluxion.layers as fl
from refiners.adapters.lora import LoraAdapter
from refiners.foundationals.latent_diffusion import (
    StableDiffusion,
    StableDiffusion_1,
    StableDiffusion_XL,
    UNet,
    UNetSpec,
)
from refiners.foundationals.latent_diffusion.steering import (
    FreeUAdapter,
    PerturbedAttentionGuidance,
    ReferenceOnlyControlAdapter,
    SelfAttentionGuidance,
    StyleAlignedAdapter,
    self_attention_guidance,
)
from refiners.foundationals.latent_diffusion.steering.steering import Steering
from refiners.solvers import DDIM


class Loras:
    """LoRAs on all attention."""

    def __init__(self, model: StableDiffusion[Any]) -> None:
        torch.manual_seed(0)
        attentions = list(model.unet.layers(fl.Attention))
        self.adapters = [
            (LoraAdapter(linear, rank=2), place) for place in attentions for linear in place.layers(nn.Linear)
        ]
        for adapter, _ in self.adapters:
            nn.init.normal_(adapter.loras["lora"].up.weight, std=0.1)

    def inject(self) -> None:
        for adapter, place in self.adapters:
            adapter.inject(place)

    def eject(self) -> None:
        for adapter, _ in self.adapters:
            adapter.eject()


def reference_only(model: StableDiffusion[Any]) -> ReferenceOnlyControlAdapter:
    adapter = ReferenceOnlyControlAdapter(model)
    adapter.set_controlnet_condition(torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5)))
    return adapter


EDITS: dict[str, Callable[[StableDiffusion[Any]], Steering | Loras]] = {
    "LoRA": Loras,
    "FreeU": lambda model: FreeUAdapter(model),
    "perturbed attention": lambda model: PerturbedAttentionGuidance(model, layers="down"),
    "self-attention guidance": SelfAttentionGuidance,
    "reference-only": reference_only,
    "StyleAligned": lambda model: StyleAlignedAdapter(model, scale=1.1),
}


@pytest.fixture(scope="module")
def model() -> StableDiffusion_1:
    return StableDiffusion_1.from_pretrained("builtin")


@pytest.fixture(scope="module")
def sdxl() -> StableDiffusion_XL:
    return small_model(StableDiffusion_XL)


@torch.no_grad()
def predict(model: StableDiffusion[Any], condition_scale: float = 3.0) -> Tensor:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(model.dtype)
    conditions = model.compute_conditions(["a red circle", "a blue square"], "", (32, 32))
    return model.predict_noise(x, 7, condition_scale=condition_scale, **conditions)


@pytest.mark.parametrize("seed", range(6))
def test_any_edits_go_on_and_off_in_any_order_without_a_trace(
    model: StableDiffusion[Any], sdxl: StableDiffusion_XL, seed: int
) -> None:
    order, model = random.Random(seed), sdxl if seed % 2 else model
    before, keys, tree = predict(model), list(model.state_dict()), repr(model.unet)
    names = order.sample(list(EDITS), k=order.randint(2, len(EDITS)))
    edits, last = [EDITS[name](model) for name in names], before
    for name, edit in zip(names, edits, strict=True):
        edit.inject()
        assert relative_error(predict(model), last) > 1e-4, name
        last = predict(model)
    assert [key for key in model.state_dict() if "Lora" not in key] == keys
    order.shuffle(edits)
    for edit in edits:
        edit.eject()
    assert torch.equal(predict(model), before) and list(model.state_dict()) == keys and repr(model.unet) == tree
    assert model.guidances == []


@pytest.mark.parametrize("attention", ["reference-only", "StyleAligned"])
def test_the_order_does_not_matter_where_only_one_adds_to_what_is_seen(
    model: StableDiffusion_1, attention: str
) -> None:
    results: list[Tensor] = []
    names = ["LoRA", "FreeU", "perturbed attention", attention]
    for order in (names, names[::-1], [*names[2:], *names[:2]]):
        edits = [EDITS[name](model) for name in order]
        for edit in edits:
            edit.inject()
        results.append(predict(model))
        for edit in edits:
            edit.eject()
    assert max(relative_error(result, results[0]) for result in results) < 1e-5


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_can_come_back(model: StableDiffusion_1, name: str) -> None:
    edit = EDITS[name](model)
    results: list[Tensor] = []
    for _ in range(2):
        edit.inject()
        results.append(predict(model))
        edit.eject()
    assert torch.equal(*results)


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_of_a_copy_does_not_show_in_the_model(model: StableDiffusion_1, name: str) -> None:
    before, other = predict(model), model.structural_copy()
    EDITS[name](other).inject()
    assert relative_error(predict(other), before) > 1e-4 and torch.equal(predict(model), before)


@pytest.mark.parametrize("name", ["FreeU", "reference-only", "StyleAligned"])
def test_an_edited_unet_can_be_copied(model: StableDiffusion_1, name: str) -> None:
    edit: Any = EDITS[name](model)
    edit.inject()
    other, expected = model.structural_copy(), predict(model)
    edit.eject()
    assert torch.equal(predict(other), expected)


@pytest.mark.parametrize("name", ["perturbed attention", "self-attention guidance"])
def test_a_deep_copy_has_guidances_of_its_own(name: str) -> None:
    model = StableDiffusion_1.from_pretrained("builtin")
    before = predict(model)
    EDITS[name](model).inject()
    expected, deep = predict(model), copy.deepcopy(model)
    (guidance,) = deep.guidances
    assert isinstance(guidance, Steering) and guidance is not model.guidances[0]
    assert torch.equal(predict(deep), expected)
    guidance.eject()
    assert torch.equal(predict(deep), before) and torch.equal(predict(model), expected)


@torch.no_grad()
def test_steps_leave_nothing_behind() -> None:
    model = small_model(solver=DDIM(6))
    for name in EDITS:
        EDITS[name](model).inject()
    text, x = torch.randn(4, 7, 32), torch.randn(2, 4, 8, 8)
    memory: list[int] = []
    for step in model.steps:
        x = model(x, step=step, clip_text_embedding=text)
        if step in (2, 4):
            memory.append(live_bytes())
    assert memory[0] == memory[1]


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_edits_together_work_in_half_precision(model: StableDiffusion_1, dtype: torch.dtype) -> None:
    results: list[Tensor] = []
    for each in (StableDiffusion_1.from_pretrained("builtin", dtype=dtype), model.structural_copy()):
        for edit in EDITS.values():
            edit(each).inject()
        each.unet.to(dtype if not results else torch.float32)
        results.append(predict(each))
    assert results[0].dtype == dtype and relative_error(results[0].float(), results[1]) < 0.05


@pytest.mark.slow
def test_an_edited_unet_compiles_into_one_graph_for_all_scales() -> None:
    unet = UNet(UNetSpec((16, 32), (1, 0), (2, 2), blocks_per_level=1, text_dim=16, norm_groups=8))
    randomize(unet)
    free_u, aligned = FreeUAdapter(unet).inject(), StyleAlignedAdapter(unet).inject()
    reference = ReferenceOnlyControlAdapter(unet).inject()
    reference.set_controlnet_condition(torch.randn(1, 4, 8, 8))
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    x, text = torch.randn(4, 4, 8, 8), torch.randn(4, 7, 16)

    def both() -> tuple[Tensor, Tensor]:
        results: list[Tensor] = []
        for each in (compiled, unet):
            unet.set_timestep(torch.full((4,), 300))
            unet.set_clip_text_embedding(text)
            unet.set_context("diffusion", {"negatives": 2})
            results.append(each(x))
        return results[0], results[1]

    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        first, expected = both()
        assert relative_error(first, expected) < 1e-5
        aligned.scale, free_u.skip_scales, reference.style_cfg = 1.4, (0.5, 0.5), 0.9
        reference.set_controlnet_condition(torch.randn(1, 4, 8, 8))
        second, expected = both()
        assert relative_error(second, expected) < 1e-5 and relative_error(second, first) > 1e-3


@pytest.mark.slow
def test_a_whole_guided_step_compiles_into_one_graph_for_all_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    # Not the blur: the compiler cannot read what jaxtyping's import hook puts around functions in tests.
    monkeypatch.setattr(self_attention_guidance, "gaussian_blur", lambda x, size, _: avg_pool2d(x, size, 1, size // 2))
    model = small_model(solver=DDIM(4))
    perturbed, blurred = PerturbedAttentionGuidance(model).inject(), SelfAttentionGuidance(model).inject()
    compiled = torch.compile(model.predict_noise, fullgraph=True, backend="eager")
    x, text = torch.randn(1, 4, 8, 8), torch.randn(2, 7, 32)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        model.predict_noise(x, 1, text)  # it looks for step listeners in the first call
        first = compiled(x, 1, text)
        assert relative_error(first, model.predict_noise(x, 1, text)) < 1e-5
        perturbed.scale, blurred.scale = 1.0, 2.0
        second = compiled(x, 1, text)
        assert relative_error(second, model.predict_noise(x, 1, text)) < 1e-5 and relative_error(second, first) > 1e-3
