"""OFTs and BOFTs compute what LyCORIS' and peft's compute; outputs and the gradients of every tensor."""

import copy
import warnings
from typing import Any

import pytest
import torch
from delta_specimens import LAYERS, as_torch, assert_close, assert_same_as, peft_on, with_deltas, with_values
from torch import Tensor

import refiners.fluxion.layers as fl
from refiners.adapters.deltas import make_delta
from refiners.adapters.orthogonal import Boft, InputBoft, InputOft, Oft, TurnedOft
from refiners.weights.lora_keys.kinds import Kind

with warnings.catch_warnings():  # what others deprecate is not ours to fix
    warnings.simplefilter("ignore")
    import peft.tuners.boft.layer as peft_boft
    from lycoris.modules.boft import ButterflyOFTModule
    from lycoris.modules.diag_oft import DiagOFTModule
    from peft import BOFTConfig, OFTConfig

FLAT = ["linear", "linear without bias", "conv 1x1"]  # layers whose inputs come one by one


@pytest.mark.parametrize("limit", [0.0, 0.01, 100.0], ids=["no limit", "limit", "far limit"])
@pytest.mark.parametrize("has_scales", [False, True])
@pytest.mark.parametrize(("module", "cls"), [(DiagOFTModule, Oft), (ButterflyOFTModule, Boft)])
@pytest.mark.parametrize("kind", LAYERS)
def test_turns_of_outputs_compute_what_lycoris_computes(
    kind: str, module: Any, cls: type[Any], has_scales: bool, limit: float
) -> None:
    torch.manual_seed(0)
    layer, x = LAYERS[kind][0](), torch.randn(LAYERS[kind][1])
    theirs = module("a", as_torch(layer), lora_dim=10 if cls is Boft else 4, constraint=limit, rescaled=has_scales)
    tensors = dict(theirs.named_parameters())
    with_values(tensors.values(), seed=1)
    weights = {part.removeprefix("oft_"): tensor for part, tensor in tensors.items()}
    parts = {part: tensor.detach().clone() for part, tensor in weights.items()}
    delta = make_delta(layer, "a", Kind.OFT, parts, limit)
    assert type(delta) is cls
    assert_same_as(theirs, weights, layer, delta, x)


@pytest.mark.parametrize("outputs", [16, 24, 64])
def test_butterflies_of_many_stages_mix_as_in_lycoris(outputs: int) -> None:
    torch.manual_seed(0)
    layer, x = fl.Linear(5, outputs), torch.randn(3, 5)
    theirs = ButterflyOFTModule("a", as_torch(layer), lora_dim=4 if outputs != 24 else 6)
    with_values([theirs.oft_blocks], seed=1)
    delta = Boft.for_layer(layer, "a", rank=theirs.block_size)
    assert delta.blocks.shape == theirs.oft_blocks.shape
    delta.blocks.data.copy_(theirs.oft_blocks.data)
    assert_same_as(theirs, {"blocks": theirs.oft_blocks}, layer, delta, x)


@pytest.mark.parametrize("kind", LAYERS)
def test_turns_of_old_files_are_taken_as_they_are(kind: str) -> None:
    torch.manual_seed(0)
    layer, x = LAYERS[kind][0](), torch.randn(LAYERS[kind][1])
    diag = torch.randn(4, 5, 5)
    old = make_delta(layer, "a", Kind.OFT, {"diag": diag})
    assert isinstance(old, TurnedOft)
    turned = torch.einsum("knm,kn...->km...", diag, layer.weight.unflatten(0, (4, 5))).flatten(0, 1)
    assert_close(layer.weight + old.delta_weight(layer.weight), turned)
    assert_close(with_deltas(layer, old)(x), torch.func.functional_call(layer, {"weight": turned}, (x,)))


@pytest.mark.parametrize("terms", [None, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("kind", FLAT)
def test_oft_of_inputs_computes_what_peft_computes(kind: str, is_shared: bool, terms: int | None) -> None:
    torch.manual_seed(0)
    layer, x = LAYERS[kind][0](), torch.randn(LAYERS[kind][1])
    series = {"use_cayley_neumann": terms is not None, "num_cayley_neumann_terms": terms or 5}
    config = OFTConfig(target_modules=["layer"], oft_block_size=4, block_share=is_shared, **series)
    theirs, tensors = peft_on(layer, config)
    (blocks,) = tensors.values()
    with_values([blocks], seed=2, std=0.2)
    parts = {"blocks": blocks.detach().clone()} | ({} if terms == 5 else {"terms": torch.tensor(terms or 0)})
    delta = InputOft(layer, "a", parts)
    assert_same_as(theirs, {"blocks": blocks}, layer, delta, x)


@pytest.mark.parametrize("kind", ["conv 3x3", "stride 2"])
def test_oft_of_inputs_of_a_kernel_is_what_peft_merges(kind: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[kind][0]()
    theirs, tensors = peft_on(layer, OFTConfig(target_modules=["layer"], oft_block_size=4))
    (blocks,) = tensors.values()
    delta = make_delta(layer, "a", Kind.OFT, {"blocks": blocks.detach().clone()})
    holder: Any = theirs
    holder.merge()
    assert_close(layer.weight + delta.delta_weight(layer.weight), holder.base_layer.weight)


class _BlockDiagonal:
    """What peft's extension for CUDA computes: a block-diagonal matrix of each stage."""

    @staticmethod
    def apply(blocks: Tensor) -> Tensor:
        return torch.stack([torch.block_diag(*stage) for stage in blocks])


@pytest.mark.parametrize(
    ("layer", "shape", "size", "stages"),
    [
        (fl.Linear(12, 20), (6, 12), 3, 1),
        (fl.Linear(12, 20, bias=False), (6, 12), 2, 2),
        (fl.Linear(32, 6), (2, 3, 32), 4, 3),
        (fl.Linear(32, 6), (2, 3, 32), 2, 4),
        (fl.Conv2d(12, 20, 1), (2, 12, 3, 3), 6, 2),
        (fl.Conv2d(12, 20, 3, padding=1), (2, 12, 3, 3), 9, 1),
        (fl.Conv2d(8, 6, 3, stride=2), (2, 8, 5, 5), 6, 3),
    ],
)
def test_boft_of_inputs_computes_what_peft_computes(
    layer: Any, shape: tuple[int, ...], size: int, stages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peft_boft, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(peft_boft, "FastBlockDiag", _BlockDiagonal)
    torch.manual_seed(0)
    layer, x = copy.deepcopy(layer), torch.randn(shape)
    config = BOFTConfig(target_modules=["layer"], boft_block_size=size, boft_n_butterfly_factor=stages)
    theirs, tensors = peft_on(layer, config)
    weights = {part.removeprefix("boft_"): tensor for part, tensor in tensors.items()}
    parts = {part: tensor.detach().clone() for part, tensor in weights.items()}
    delta = make_delta(layer, "a", Kind.BOFT, parts)
    assert isinstance(delta, InputBoft) and delta.parts()["R"].shape[0] == stages
    assert_same_as(theirs, weights, layer, delta, x)


@pytest.mark.parametrize("cls", [Oft, Boft])
def test_a_rank_without_blocks_is_explained(cls: type[Oft]) -> None:
    with pytest.raises(ValueError, match=r"7 outputs .*: give another rank"):
        cls.for_layer(fl.Linear(3, 7), "a", rank=6)


def test_blocks_of_no_known_form_are_explained() -> None:
    with pytest.raises(ValueError, match=r"'a' should have blocks of 2 \(peft\), 3 or 4 .*, but has of shape \(4,\)"):
        make_delta(fl.Linear(3, 4), "a", Kind.OFT, {"blocks": torch.ones(4)})
    with pytest.raises(
        ValueError, match=r"blocks has shape \(2, 3, 3\), which makes no blocks of the layer's 4 outputs"
    ):
        make_delta(fl.Linear(3, 4), "a", Kind.OFT, {"blocks": torch.ones(2, 3, 3)})
