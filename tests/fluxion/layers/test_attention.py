"""Attention equals torch.nn.MultiheadAttention, and the formula, forwards and backwards, however it is computed."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import refiners.fluxion.layers as fl

BATCH, QUERIES, KEYS = 2, 5, 7


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(*dims: int, queries: int = QUERIES, keys: int = KEYS) -> list[Tensor]:
    """Query, key and value, of these widths."""
    lengths = (queries, keys, keys)
    return [random(BATCH, lengths[i], dim, seed=i).requires_grad_() for i, dim in enumerate(dims)]


def formula(query: Tensor, key: Tensor, value: Tensor, num_heads: int = 1, is_causal: bool = False) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V, one query and one head at a time."""
    heads: list[Tensor] = []
    for q, k, v in zip(*[x.chunk(num_heads, dim=-1) for x in (query, key, value)], strict=True):
        rows: list[Tensor] = []
        for position in range(q.shape[1]):
            seen = position + 1 if is_causal else k.shape[1]
            scores = (q[:, position, None] * k[:, :seen]).sum(-1) / q.shape[-1] ** 0.5
            weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
            rows.append((weights[..., None] * v[:, :seen]).sum(1))
        heads.append(torch.stack(rows, dim=1))
    return torch.cat(heads, dim=-1)


def randomise(layer: nn.Module) -> None:
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data.copy_(random(*parameter.shape, seed=10 + seed))


def gradients(layer: Callable[..., Tensor], leaves: list[Tensor], xs: list[Tensor]) -> tuple[Tensor, ...]:
    output = layer(*xs)
    return torch.autograd.grad(output, leaves, random(*output.shape, seed=9))


# --- scaled dot products ----------------------------------------------------------------------------------------------

FORMS: dict[str, dict[str, Any]] = {
    "fused": {},
    "step by step": {"is_optimized": False},
    "fused, sliced": {"slice_size": 2},
    "step by step, sliced": {"is_optimized": False, "slice_size": 2},
    "in one slice": {"slice_size": 100},
    "fused, causal": {"is_causal": True},
    "step by step, causal": {"is_optimized": False, "is_causal": True},
}


@pytest.mark.parametrize("num_heads", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_scaled_dot_products_equal_the_formula(form: str, num_heads: int) -> None:
    layer, is_causal = fl.ScaledDotProductAttention(num_heads, **FORMS[form]), FORMS[form].get("is_causal", False)
    xs = inputs(6, 6, 9)  # values may be wider than queries and keys

    def reference(*xs: Tensor) -> Tensor:
        return formula(*xs, num_heads=num_heads, is_causal=is_causal)

    assert_close(layer(*xs), reference(*xs))
    assert_close(gradients(layer, xs, xs), gradients(reference, xs, xs))


@pytest.mark.parametrize("is_optimized", [True, False])
def test_causal_output_does_not_depend_on_later_positions(is_optimized: bool) -> None:
    layer = fl.ScaledDotProductAttention(2, is_causal=True, is_optimized=is_optimized)
    q, k, v = inputs(4, 4, 4, queries=6, keys=6)
    changed_k, changed_v = k.detach().clone(), v.detach().clone()
    changed_k[:, 4:] += 1
    changed_v[:, 4:] += 1
    before, after = layer(q, k, v), layer(q, changed_k, changed_v)
    assert_close(after[:, :4], before[:, :4])
    assert not torch.isclose(after[:, 4:], before[:, 4:]).any()


@pytest.mark.parametrize(
    ("options", "lengths"),
    [({}, [5]), ({"slice_size": 2}, [2, 2, 1]), ({"slice_size": 5}, [5]), ({"is_optimized": False}, [])],
    ids=["whole", "slices of 2", "slices of all", "step by step"],
)
def test_torch_fused_kernel_gets_as_many_queries_as_a_slice_has(
    options: dict[str, Any], lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    fused, seen = F.scaled_dot_product_attention, list[int]()

    def spy(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(query.shape[-2])
        return fused(query, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    fl.ScaledDotProductAttention(2, **options)(*inputs(4, 4, 4))
    assert seen == lengths


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slice_size": 0}, "slice_size=0 must be at least 1"),
        ({"num_heads": 0}, "at least 1 head, not 0"),
        ({"num_heads": -2}, "at least 1 head, not -2"),
        ({"slice_size": 2, "is_causal": True}, "slice_size=2 .* does not go with is_causal=True"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fl.ScaledDotProductAttention(**options)


@pytest.mark.parametrize("shape", [(2, 5, 4), (5, 6), (2, 1, 5, 6)])
def test_scaled_dot_products_refuse_what_does_not_split_into_heads_and_name_both_numbers(
    shape: tuple[int, ...],
) -> None:
    with pytest.raises(ValueError, match=f"attention of 3 heads .* not {re.escape(str(shape))}"):
        fl.ScaledDotProductAttention(num_heads=3)(*[torch.ones(shape)] * 3)


# --- attention against torch.nn.MultiheadAttention --------------------------------------------------------------------


def torch_twin(ours: fl.Attention) -> nn.MultiheadAttention:
    """torch's own layer with the weights of ours; its input bias is 0 if ours has none."""
    theirs = nn.MultiheadAttention(
        ours.embedding_dim,
        ours.num_heads,
        kdim=ours.key_embedding_dim,
        vdim=ours.value_embedding_dim,
        batch_first=True,
        dtype=torch.float64,
    )
    projections = list(ours.ensure_find(fl.Distribute).layers(fl.Linear))
    weights = [layer.weight.detach() for layer in projections]
    state = {"q_proj_weight": weights[0], "k_proj_weight": weights[1], "v_proj_weight": weights[2]}
    if theirs.in_proj_weight is not None:
        state = {"in_proj_weight": torch.cat(weights)}
    state["in_proj_bias"] = torch.zeros(3 * ours.embedding_dim, dtype=torch.float64)
    if ours.use_bias:
        state["in_proj_bias"] = torch.cat([layer.bias.detach() for layer in projections])
    last = ours.layer("Linear", fl.Linear)
    theirs.load_state_dict(state | {"out_proj.weight": last.weight, "out_proj.bias": last.bias})
    return theirs


def weight_gradients(layer: nn.Module) -> dict[str, Tensor]:
    """By role, for ours and torch's alike: each projection's weight, all input biases together, the output bias."""
    found = {name: parameter.grad for name, parameter in layer.named_parameters() if parameter.grad is not None}
    if isinstance(layer, nn.MultiheadAttention):
        if "in_proj_weight" in found:
            names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
            found |= dict(zip(names, found.pop("in_proj_weight").chunk(3), strict=True))
        return found
    roles = {"Distribute.Linear_1": "q_proj", "Distribute.Linear_2": "k_proj", "Distribute.Linear_3": "v_proj"}
    renamed = {f"{roles[slot]}_weight": found[f"{slot}.weight"] for slot in roles}
    biases = [found[f"{slot}.bias"] for slot in roles if f"{slot}.bias" in found]
    renamed |= {"in_proj_bias": torch.cat(biases)} if biases else {}
    return renamed | {"out_proj.weight": found["Linear.weight"], "out_proj.bias": found["Linear.bias"]}


def check_against_torch(ours: fl.Attention, xs: list[Tensor], triple: Callable[..., Any]) -> None:
    """Compare output and all gradients; `triple` makes torch's three inputs from ours."""
    randomise(ours)
    theirs = torch_twin(ours)
    mask = torch.ones(xs[0].shape[1], triple(*xs)[1].shape[1], dtype=torch.bool).triu(1) if ours.is_causal else None
    output = ours(*xs)
    expected = theirs(*triple(*xs), need_weights=False, attn_mask=mask)[0]
    assert_close(output, expected)
    cotangent = random(*output.shape, seed=9)
    ours_for_inputs = torch.autograd.grad(output, xs, cotangent, retain_graph=True)
    assert_close(ours_for_inputs, torch.autograd.grad(expected, xs, cotangent, retain_graph=True))
    output.backward(cotangent)
    expected.backward(cotangent)
    expected_gradients = weight_gradients(theirs)
    if not ours.use_bias:
        del expected_gradients["in_proj_bias"]
    assert_close(weight_gradients(ours), expected_gradients)


@pytest.mark.parametrize("dims", [{}, {"key_embedding_dim": 3, "value_embedding_dim": 5}])
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("is_optimized", [True, False])
def test_attention_equals_torch(dims: dict[str, int], use_bias: bool, is_optimized: bool) -> None:
    ours = fl.Attention(
        embedding_dim=6, num_heads=2, use_bias=use_bias, is_optimized=is_optimized, dtype=torch.float64, **dims
    )
    xs = inputs(6, dims.get("key_embedding_dim", 6), dims.get("value_embedding_dim", 6))
    check_against_torch(ours, xs, lambda *xs: xs)


@pytest.mark.parametrize("is_optimized", [True, False])
def test_causal_attention_equals_torch_with_a_mask(is_optimized: bool) -> None:
    ours = fl.Attention(6, num_heads=3, is_causal=True, is_optimized=is_optimized, dtype=torch.float64)
    check_against_torch(ours, inputs(6, 6, 6), lambda *xs: xs)


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("is_causal", [True, False])
def test_self_attention_equals_torch(use_bias: bool, is_causal: bool) -> None:
    ours = fl.SelfAttention(embedding_dim=6, num_heads=2, use_bias=use_bias, is_causal=is_causal, dtype=torch.float64)
    check_against_torch(ours, inputs(6), lambda x: (x, x, x))


def as_sequence(x: Tensor) -> Tensor:
    """(B, C, H, W) to (B, H W, C), a position at a time."""
    return torch.stack([x[:, :, row, column] for row in range(x.shape[2]) for column in range(x.shape[3])], dim=1)


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("size", [(2, 3), (4, 1), (1, 1)])
def test_self_attention_over_pictures_equals_torch_over_their_positions(
    size: tuple[int, int], use_bias: bool, is_causal: bool
) -> None:
    ours = fl.SelfAttention2d(channels=6, num_heads=3, use_bias=use_bias, is_causal=is_causal, dtype=torch.float64)
    randomise(ours)
    theirs = torch_twin(ours)
    x = random(BATCH, 6, *size).requires_grad_()
    positions = size[0] * size[1]
    mask = torch.ones(positions, positions, dtype=torch.bool).triu(1) if is_causal else None
    output, sequence = ours(x), as_sequence(x)
    expected = theirs(sequence, sequence, sequence, need_weights=False, attn_mask=mask)[0]
    assert output.shape == x.shape
    assert_close(as_sequence(output), expected)
    cotangent = random(*x.shape, seed=9)
    (gradient,) = torch.autograd.grad(output, x, cotangent)
    assert_close(gradient, torch.autograd.grad(expected, x, as_sequence(cotangent))[0])


@pytest.mark.parametrize("cls", [fl.Attention, fl.SelfAttention])
def test_the_inner_dimension_is_that_of_all_heads_together(cls: type[fl.Attention]) -> None:
    layer = cls(embedding_dim=4, inner_dim=6, num_heads=3, dtype=torch.float64)
    randomise(layer)
    xs = inputs(4, 4, 4) if cls is fl.Attention else inputs(4)
    q, k, v = [
        linear(x) for linear, x in zip(layer.layer("Distribute", fl.Distribute), xs * (3 // len(xs)), strict=True)
    ]
    assert q.shape[-1] == 6
    assert_close(layer(*xs), layer.layer("Linear", fl.Linear)(formula(q, k, v, num_heads=3)))


def test_self_attentions_over_pictures_nest_and_follow_one_another() -> None:
    first, second = fl.SelfAttention2d(4, num_heads=2), fl.SelfAttention2d(4)
    x = torch.randn(1, 4, 3, 2)
    expected = second(first(x)[:, :, :2]) + x[:, :, :2]
    tree = fl.Sum(fl.Chain(first, fl.Slicing(dim=2, end=2), second), fl.Slicing(dim=2, end=2))
    assert_close(tree(x), expected)
    first.insert(1, fl.Passthrough(fl.Slicing(dim=2, end=1), fl.SelfAttention2d(4)))  # between its own two ends
    assert_close(tree(x), expected)


def test_a_failed_call_leaves_no_picture_size_behind() -> None:
    layer = fl.SelfAttention2d(4)
    with pytest.raises(RuntimeError):
        layer(torch.ones(1, 3, 2, 5))
    assert layer(torch.ones(1, 4, 3, 2)).shape == (1, 4, 3, 2)
    assert layer.contexts == {"flatten": {"sizes": []}}


def test_attention_keeps_its_arguments_and_holds_four_linears() -> None:
    arguments = {
        "embedding_dim": 6,
        "num_heads": 2,
        "key_embedding_dim": 3,
        "value_embedding_dim": 5,
        "inner_dim": 8,
        "use_bias": False,
        "is_causal": True,
        "is_optimized": False,
    }
    layer = fl.Attention(**arguments)
    assert {name: getattr(layer, name) for name in arguments} == arguments
    shapes = [(tuple(linear.weight.shape), linear.bias is not None) for linear, _ in layer.walk(fl.Linear)]
    assert shapes == [((8, 6), False), ((8, 3), False), ((8, 5), False), ((6, 8), True)]
    products = layer.ensure_find(fl.ScaledDotProductAttention)
    assert (products.num_heads, products.is_causal, products.is_optimized) == (2, True, False)
    assert fl.SelfAttention2d(channels=6).channels == 6


@pytest.mark.parametrize(
    ("build", "dim", "heads"),
    [
        (lambda: fl.Attention(8, num_heads=3), 8, 3),
        (lambda: fl.Attention(9, num_heads=3, inner_dim=7), 7, 3),
        (lambda: fl.SelfAttention(8, num_heads=5), 8, 5),
        (lambda: fl.SelfAttention2d(8, num_heads=16), 8, 16),
        (lambda: fl.Attention(8, num_heads=0), 8, 0),
        (lambda: fl.Attention(8, num_heads=-2), 8, -2),
    ],
    ids=["attention", "inner_dim", "self attention", "more heads than channels", "no heads", "less than none"],
)
def test_heads_that_do_not_divide_are_refused_with_both_numbers(build: Callable[[], Any], dim: int, heads: int) -> None:
    with pytest.raises(ValueError, match=f"{dim} .*{heads} heads"):
        build()


def test_none_for_is_causal_is_no_as_in_the_last_refiners() -> None:
    q, k, v = (torch.randn(2, 5, 4) for _ in range(3))
    plain = fl.ScaledDotProductAttention(2, is_causal=None)
    assert torch.equal(plain(q, k, v), fl.ScaledDotProductAttention(2)(q, k, v))
    for attention in (fl.Attention(4, is_causal=None), fl.SelfAttention2d(4, is_causal=None)):
        assert attention.is_causal is False
