"""The ViT of the project's first README: its model, its context and its LoRA loop run as they stand there."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.adapters import LoraAdapter

VIT = """
import torch
import refiners.fluxion.layers as fl

class ViT(fl.Chain):
    # The Vision Transformer model structure is entirely defined in the constructor. It is
    # ready-to-use right after i.e. no need to implement any forward function or add extra logic
    def __init__(
        self,
        embedding_dim: int = 512,
        patch_size: int = 16,
        image_size: int = 384,
        num_layers: int = 12,
        num_heads: int = 8,
    ):
        num_patches = (image_size // patch_size)
        super().__init__(
            fl.Conv2d(in_channels=3, out_channels=embedding_dim, kernel_size=patch_size, stride=patch_size),
            fl.Reshape(num_patches**2, embedding_dim),
            # The Residual layer implements the so-called skip-connection, i.e. x + F(x).
            # Here the patch embeddings (x) are summed with the position embeddings (F(x)) whose
            # weights are stored in the Parameter layer (note: there is no extra classification
            # token in this toy example)
            fl.Residual(fl.Parameter(num_patches**2, embedding_dim)),
            # These are the transformer encoders:
            *(
                fl.Chain(
                    fl.LayerNorm(embedding_dim),
                    fl.Residual(
                        # The Parallel layer is used to pass multiple inputs to a downstream
                        # layer, here multiheaded self-attention
                        fl.Parallel(
                            fl.Identity(),
                            fl.Identity(),
                            fl.Identity()
                        ),
                        fl.Attention(
                            embedding_dim=embedding_dim,
                            num_heads=num_heads,
                            key_embedding_dim=embedding_dim,
                            value_embedding_dim=embedding_dim,
                        ),
                    ),
                    fl.LayerNorm(embedding_dim),
                    fl.Residual(
                        fl.Linear(embedding_dim, embedding_dim * 4),
                        fl.GeLU(),
                        fl.Linear(embedding_dim * 4, embedding_dim),
                    ),
                    fl.Chain(
                        fl.Linear(embedding_dim, embedding_dim * 4),
                        fl.GeLU(),
                        fl.Linear(embedding_dim * 4, embedding_dim),
                    ),
                )
                for _ in range(num_layers)
            ),
            fl.Reshape(embedding_dim, num_patches, num_patches),
        )
"""
MODEL = "vit = ViT(embedding_dim=768, image_size=224, num_heads=12)  # ~ViT-B/16 like\n"
INPUT = "x = torch.randn(2, 3, 224, 224)\n"
CALL = "y = vit(x)\n"
PARALLEL = """\
                            fl.Identity(),
                            fl.Identity(),
                            fl.Identity()
"""
PARALLEL_WITH_CONTEXT = """\
                            fl.Identity(),
                            fl.UseContext(context="cross_attention", key="my_embed"),
                            fl.UseContext(context="cross_attention", key="my_embed"),
"""
CONTEXT = 'vit.set_context("cross_attention", {"my_embed": torch.randn(2, 196, 768)})\n'
LORA = """
from refiners.adapters.lora import LoraAdapter

for layer in vit.layers(fl.Attention):
    for linear, parent in layer.walk(fl.Linear):
        adapter = LoraAdapter(target=linear, rank=64, device=vit.device, dtype=vit.dtype)
        adapter.inject(parent)

# ... and load existing weights if the LoRAs are pretrained ...
"""
VIT_WITH_CONTEXT = VIT.replace(PARALLEL, PARALLEL_WITH_CONTEXT)
SMALL = "vit = ViT(embedding_dim=16, image_size=64, num_layers=3, num_heads=4)\n"


def run(code: str, **names: Any) -> dict[str, Any]:
    exec(code, names)  # pyright: ignore
    return names


def small_vit(code: str = VIT) -> Any:
    torch.manual_seed(0)
    return run(code + SMALL)["vit"]


@pytest.mark.slow
def test_the_readme_runs_word_for_word() -> None:
    with torch.no_grad():
        names = run(VIT + MODEL + INPUT + CALL)
        assert names["y"].shape == (2, 768, 14, 14)
        plain_keys = list(names["vit"].state_dict())
        names = run(VIT_WITH_CONTEXT + MODEL + CONTEXT + INPUT + CALL + LORA + CONTEXT + "z = vit(x)\n")
    assert VIT_WITH_CONTEXT != VIT
    assert names["y"].shape == names["z"].shape == (2, 768, 14, 14)
    assert set(plain_keys) <= set(names["vit"].state_dict())
    assert len(list(names["vit"].layers(LoraAdapter))) == 12 * 4


@pytest.mark.parametrize("code", [VIT, VIT_WITH_CONTEXT], ids=["self-attention", "context"])
def test_the_readme_s_loop_adapts_every_linear_of_every_attention_and_starts_as_zero(code: str) -> None:
    vit, x = small_vit(code), torch.randn(2, 3, 64, 64)
    context = {"my_embed": torch.randn(2, 16, 16)}
    keys = list(vit.state_dict())

    def call() -> Tensor:
        vit.set_context("cross_attention", context)
        return vit(x)

    before = call()
    run(LORA, vit=vit, fl=fl)
    adapters = list(vit.layers(LoraAdapter))
    assert len(adapters) == 3 * 4
    assert {adapter.loras["lora"].rank for adapter in adapters} == {64}
    assert all(isinstance(adapter.target, nn.Linear) and adapter.root is vit for adapter in adapters)
    assert [key for key in vit.state_dict() if "LoraAdapter" not in key] == keys
    torch.testing.assert_close(call(), before)
    for adapter in adapters:
        nn.init.normal_(adapter.loras["lora"].up.weight)
    assert not torch.allclose(call(), before, atol=1e-2)
    for adapter in adapters:
        adapter.eject()
    assert torch.equal(call(), before)


def test_the_readme_s_loop_run_twice_stacks_a_second_lora_on_every_linear() -> None:
    vit, x = small_vit(), torch.randn(2, 3, 64, 64)
    keys, before = list(vit.state_dict()), vit(x)
    linears = [linear for layer in vit.layers(fl.Attention) for linear in layer.layers(fl.Linear)]
    run(LORA, vit=vit, fl=fl)
    first = list(vit.layers(LoraAdapter))
    for adapter in first:
        nn.init.normal_(adapter.loras["lora"].up.weight)
    once = vit(x)
    run(LORA, vit=vit, fl=fl)
    everyone = list(vit.layers(LoraAdapter, recurse=True))
    second = [adapter for adapter in everyone if adapter not in first]
    assert len(second) == len(first) == len(linears) == 12
    assert [adapter.base for adapter in first] == linears
    assert {adapter.base for adapter in second} == set(linears)
    torch.testing.assert_close(vit(x), once)
    for adapter in second:
        nn.init.normal_(adapter.loras["lora"].up.weight)
    assert not torch.allclose(vit(x), once, atol=1e-2)
    assert [key for key in vit.state_dict() if "LoraAdapter" not in key] == keys
    for adapter in first:
        adapter.eject()
    assert len(list(vit.layers(LoraAdapter, recurse=True))) == 12
    for adapter in second:
        adapter.eject()
    assert list(vit.state_dict()) == keys
    assert torch.equal(vit(x), before)
    assert [linear for layer in vit.layers(fl.Attention) for linear in layer.layers(fl.Linear)] == linears


@pytest.mark.parametrize("recurse", [False, True])
@pytest.mark.parametrize("kind", [fl.Linear, nn.Linear, (fl.Linear, fl.Conv2d)])
def test_a_walk_that_adapts_what_it_finds_meets_every_layer_once(recurse: bool, kind: Any) -> None:
    vit = small_vit()
    wanted = [id(module) for module in vit.modules() if isinstance(module, kind)]
    for _ in range(2):
        met = []
        for layer, parent in vit.walk(kind, recurse=recurse):
            met.append(id(layer))
            LoraAdapter(layer, rank=1).inject(parent)
        assert met == wanted
    assert sum(isinstance(module, LoraAdapter) for module in vit.modules()) == 2 * len(wanted)
