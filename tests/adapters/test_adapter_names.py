"""Adapters are transparent in names: those of the base stay, own tensors live below the adapter's own name."""

import itertools
import re
from typing import Any

import pytest
import torch
from adapter_specimens import KINDS, PLACES, WIDTH, Gain, Side, adapted, lora_on, make_input, make_model, randomize
from torch import Tensor, nn
from torch.func import functional_call

import refiners.fluxion.layers as fl
from refiners.adapters import Adapter

each_kind = pytest.mark.parametrize("kind", KINDS)
each_place = pytest.mark.parametrize("path", PLACES.values(), ids=PLACES)


def names_of(module: nn.Module) -> dict[str, list[tuple[str, Any]]]:
    """Every list of names that torch gives out, each name with the object that it stands for."""
    return {
        "state_dict": [(name, tensor.data_ptr()) for name, tensor in module.state_dict().items()],
        "named_parameters": list(module.named_parameters()),
        "named_buffers": list(module.named_buffers()),
        "named_modules": list(module.named_modules()),
    }


def assert_consistent(module: nn.Module) -> None:
    """All names are unique, agree with one another, and lead to what they stand for."""
    listed = names_of(module)
    for pairs in listed.values():
        assert len({name for name, _ in pairs}) == len(pairs)
    parameters, buffers = dict(listed["named_parameters"]), dict(listed["named_buffers"])
    saved = {name for name, _ in listed["state_dict"]}
    assert parameters.keys() <= saved <= parameters.keys() | buffers.keys()
    for name, parameter in parameters.items():
        assert module.get_parameter(name) is parameter, name
    for name, buffer in buffers.items():
        assert module.get_buffer(name) is buffer, name
    for name, part in listed["named_modules"]:
        found = module.get_submodule(name)
        assert found is part or (not name and isinstance(found, Adapter) and found.base is part), name
    owners = {name for name, _ in listed["named_modules"]}
    assert {name.rpartition(".")[0] for name in parameters | buffers} <= owners


# -- names


@each_kind
@each_place
def test_names_of_the_base_are_unchanged_and_stand_for_the_same_objects(kind: str, path: str) -> None:
    model = make_model()
    before = names_of(model)
    adapter = adapted(kind, path, model)
    after = names_of(model.root)
    for which, pairs in before.items():
        kept = [pair for pair in after[which] if pair in pairs]
        assert kept == pairs, which
        own = f"{path}.{kind}".strip(".")
        added = [name for name, _ in after[which] if name not in dict(pairs)]
        assert all(name == own or name.startswith(f"{own}.") for name in added), which
    assert_consistent(model.root)
    assert adapter.get_submodule(kind) is adapter


@each_kind
def test_a_name_stands_for_what_is_adapted_and_a_slot_holds_the_adapter(kind: str) -> None:
    model = make_model()
    target = model.Linear
    inner, outer = adapted(kind, "Linear", model), adapted("Gain", "Linear", model)
    names = dict(model.named_modules())
    assert names["Linear"] is model.get_submodule("Linear") is target
    assert model.Linear is model.layer("Linear") is model[0] is outer
    own = [name for name, module in names.items() if module in (inner, outer)]
    assert {model.get_submodule(name) for name in own} == {inner, outer}
    with pytest.raises(AttributeError):
        model.get_submodule("Linear.Other")


def test_own_tensors_have_names_below_the_class_of_the_adapter() -> None:
    model = make_model()
    adapted("Gain", "Linear", model)
    adapted("Side", "Residual", model)
    own = [name for name in model.state_dict() if "Gain" in name or "Side" in name]
    assert own == ["Linear.Gain.gain", "Linear.Gain.offset", "Residual.Side.Linear.weight", "Residual.Side.Linear.bias"]


@each_place
@pytest.mark.parametrize("kinds", list(itertools.permutations(["Deep", "Side", "Gain", "Replaced"], 3)), ids=" ".join)
def test_names_stay_consistent_in_a_stack_of_any_kinds(kinds: tuple[str, ...], path: str) -> None:
    model = make_model()
    before = names_of(model)
    for kind in kinds:
        adapted(kind, path, model.root)
        assert_consistent(model.root)
    for which, pairs in before.items():
        assert [pair for pair in names_of(model.root)[which] if pair in pairs] == pairs


def test_two_adapters_of_a_class_in_one_slot_have_names_of_their_own() -> None:
    model = make_model()
    adapters = [adapted("Gain", "Linear", model) for _ in range(3)]
    own = [name for name in model.state_dict() if name.endswith("gain")]
    assert len(set(own)) == 3 and all(re.fullmatch(r"Linear\.Gain(_\d+)?\.gain", name) for name in own)
    assert_consistent(model)
    adapters[0].eject()
    assert_consistent(model)
    adapters[0].inject()
    assert_consistent(model)
    assert len({name for name in model.state_dict() if name.endswith("gain")}) == 3


def test_two_adapters_built_before_injecting_have_names_of_their_own() -> None:
    model = make_model()
    adapters = [Gain(model.Linear) for _ in range(3)]
    for adapter in adapters:
        adapter.inject()
        assert_consistent(model)
    assert sum(name.endswith(".gain") for name in model.state_dict()) == 3


@each_kind
@pytest.mark.parametrize("path", ["Linear", "Residual"])
def test_names_of_an_adapter_that_waits_on_one_of_its_class_are_its_own(kind: str, path: str) -> None:
    model, twin = make_model(), make_model()
    waiting, other = (KINDS[kind](adapted(kind, path, tree)) for tree in (model, twin))
    assert_consistent(waiting)
    randomize(waiting)
    other.load_state_dict(waiting.state_dict(), strict=True)
    assert all(map(torch.equal, other.parameters(), waiting.parameters()))


@pytest.mark.parametrize("kind", ["Side", "Deep", "Doubled"])
def test_names_are_right_where_the_adapter_and_its_target_have_children_of_one_name(kind: str) -> None:
    inner = fl.Chain(fl.Chain(fl.Linear(WIDTH, WIDTH)), fl.Residual(fl.Linear(WIDTH, WIDTH)), fl.Linear(WIDTH, WIDTH))
    model = fl.Chain(inner, fl.Identity())
    before = names_of(model)
    adapter = KINDS[kind](model.Chain).inject()
    assert_consistent(model)
    for which, pairs in before.items():
        assert [pair for pair in names_of(model)[which] if pair in pairs] == pairs
    adapter.eject()
    assert names_of(model) == before


def test_names_are_right_where_the_adapter_and_its_target_have_a_parameter_of_one_name() -> None:
    class Weighted(fl.Chain, Adapter[fl.Linear]):
        def __init__(self, target: fl.Linear) -> None:
            with self.setup_adapter(target):
                super().__init__(target)
                self.weight = nn.Parameter(torch.ones(WIDTH))

    model = make_model()
    weight = model.Linear.weight
    try:
        Weighted(model.Linear).inject()
    except ValueError as error:  # to refuse it is right as well
        assert "weight" in str(error)
    assert model.get_parameter("Linear.weight") is weight
    assert_consistent(model)


# -- checkpoints


@each_kind
@each_place
def test_a_checkpoint_of_the_base_loads_into_an_adapted_model(kind: str, path: str) -> None:
    source, model, x = make_model(seed=3), make_model(), make_input()
    adapter = adapted(kind, path, model)
    own = {name: value.clone() for name, value in model.root.state_dict().items() if f"{kind}." in name}
    result = model.root.load_state_dict(source.state_dict(), strict=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    for name, value in source.state_dict().items():
        assert torch.equal(model.root.state_dict()[name], value)
    assert all(torch.equal(model.root.state_dict()[name], value) for name, value in own.items())
    adapter.eject()
    assert torch.equal(model(x), source(x))


@each_kind
@each_place
@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_of_an_adapted_model_round_trips(kind: str, path: str, assign: bool) -> None:
    source, model, x = make_model(seed=3), make_model(), make_input()
    for tree in (source, model):
        adapted(kind, path, tree)
        adapted("Gain", path, tree.root)
    randomize(source.root)
    checkpoint = source.root.state_dict()
    result = model.root.load_state_dict(checkpoint, strict=True, assign=assign)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert list(model.root.state_dict()) == list(checkpoint)
    assert torch.equal(model.root(x), source.root(x))
    if assign:
        assert all(model.root.state_dict()[name].data_ptr() == value.data_ptr() for name, value in checkpoint.items())
    assert_consistent(model.root)


def test_the_base_part_of_an_adapted_checkpoint_loads_into_a_plain_model() -> None:
    source, model, x = make_model(seed=3), make_model(), make_input()
    adapter = adapted("Side", "Linear", source)
    result = model.load_state_dict(source.state_dict(), strict=False)
    assert result.missing_keys == []
    assert result.unexpected_keys == ["Linear.Side.Linear_2.weight", "Linear.Side.Linear_2.bias"]
    adapter.eject()
    assert torch.equal(model(x), source(x))


def test_a_base_checkpoint_is_assigned_to_an_adapted_model_on_the_meta_device() -> None:
    source, x = make_model(seed=3), make_input()
    model = make_model().to("meta")
    adapter = Side(model.Residual).inject()
    model.load_state_dict(source.state_dict(), assign=True)
    assert [name for name, tensor in model.state_dict().items() if tensor.is_meta] == []
    adapter.eject()
    assert torch.equal(model(x), source(x))


def test_loading_a_base_checkpoint_asks_for_all_that_loading_into_the_base_asks_for() -> None:
    model = make_model()
    checkpoint = model.state_dict()
    del checkpoint["BatchNorm1d.num_batches_tracked"]  # torch tells by the checkpoint's metadata that it must be there
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        model.load_state_dict(checkpoint)
    adapted("Side", "Linear", model)
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        model.load_state_dict(checkpoint)


NAMES = {
    "of the target": "Linear.weight",
    "of the adapter": "Linear.Side.Linear_2.weight",
    "of an adapter in the hole": "Linear.LoraAdapter.LinearLora.up.weight",
    "below an adapted chain": "Residual.Linear_2.bias",
    "of an adapter of a chain": "Residual.Deep.Residual.Chain.Side.Linear.weight",
    "beside the adapters": "Chain.LayerNorm.weight",
}


def much_adapted(seed: int) -> fl.Chain:
    model = make_model(seed)
    lora = lora_on(model.Linear)
    Side(model.Linear).inject()
    lora.inject()
    around = adapted("Deep", "Residual", model)
    Side(around.Residual.Chain).inject()
    return model


CASES = [(top, name) for name in NAMES.values() for top in ("", "Residual", "Linear") if name.startswith(top)]


@pytest.mark.parametrize(("top", "name"), CASES)
def test_load_errors_name_keys_as_users_know_them(name: str, top: str) -> None:
    adapted_model = much_adapted(0)
    model = getattr(adapted_model, top) if top else adapted_model
    name = name.removeprefix(f"{top}.")
    complete = model.state_dict()
    misshapen = {**complete, name: torch.zeros(7, 5)}
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict(misshapen)
    assert str(caught.value).count(f"size mismatch for {name}: copying a param with shape torch.Size([7, 5])") == 1
    assert str(caught.value).count("size mismatch") == 1

    lacking = {key: value for key, value in complete.items() if key != name}
    with pytest.raises(RuntimeError, match="Missing key") as caught:
        model.load_state_dict(lacking)
    assert f'Missing key(s) in state_dict: "{name}".' in str(caught.value)
    assert model.load_state_dict(lacking, strict=False).missing_keys == [name]

    stem = name.rpartition(".")[0]
    surplus = {**complete, f"{stem}.odd": torch.zeros(1)} if stem else {**complete, "odd": torch.zeros(1)}
    odd = f"{stem}.odd".removeprefix(".")
    with pytest.raises(RuntimeError, match="Unexpected key") as caught:
        model.load_state_dict(surplus)
    assert f'Unexpected key(s) in state_dict: "{odd}".' in str(caught.value)
    assert model.load_state_dict(surplus, strict=False).unexpected_keys == [odd]


def test_loading_leaves_the_caller_s_checkpoint_alone() -> None:
    model = much_adapted(0)
    checkpoint = model.state_dict()
    keys, values = list(checkpoint), [value.clone() for value in checkpoint.values()]
    model.load_state_dict(checkpoint)
    model.load_state_dict({key: checkpoint[key] for key in keys if "Side" not in key and "Lora" not in key})
    assert list(checkpoint) == keys
    assert all(map(torch.equal, checkpoint.values(), values))


# -- what goes by names


def test_functional_call_puts_every_named_tensor_where_its_name_says() -> None:
    model, x = much_adapted(0), make_input()
    output = model(x)
    changed = 0
    for name, parameter in model.named_parameters():
        zero = torch.zeros_like(parameter)
        functional = functional_call(model, {name: zero}, (x,))
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.zero_()
            expected = model(x)
            parameter.copy_(kept)
        assert torch.equal(functional, expected), name
        changed += not torch.equal(expected, output)
    assert changed > 10
    assert torch.equal(model(x), output)


@each_kind
@each_place
def test_functional_call_of_any_adapter_equals_the_change_in_place(kind: str, path: str) -> None:
    model, x = make_model(), make_input()
    adapted(kind, path, model)
    everything: dict[str, Tensor] = {name: torch.zeros_like(p) for name, p in model.root.named_parameters()}
    functional = functional_call(model.root, everything, (x,))
    with torch.no_grad():
        for parameter in model.root.parameters():
            parameter.zero_()
    assert torch.equal(functional, model.root(x))


def test_gradients_reach_parameters_by_name_as_in_backward() -> None:
    model, x = much_adapted(0), make_input()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    by_name = torch.func.grad(lambda named: functional_call(model, named, (x,)).square().sum())(parameters)
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(by_name[name], parameter.grad, rtol=1e-5, atol=1e-6)


def test_moving_and_training_mode_reach_everything_below_an_adapter() -> None:
    model = much_adapted(0)
    model.train().double().requires_grad_(False)
    assert all(module.training for module in model.modules())
    saved = {name: tensor.dtype for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    assert {dtype for name, dtype in saved.items() if not name.endswith("alpha")} == {torch.float64}
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_an_optimizer_sees_every_parameter_once() -> None:
    model = much_adapted(0)
    listed = [id(parameter) for parameter in model.parameters()]
    assert len(listed) == len(set(listed)) == len(list(model.named_parameters()))
    assert {id(p) for module in model.modules() for p in module._parameters.values() if p is not None} == set(listed)
