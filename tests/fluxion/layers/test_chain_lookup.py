"""Building a Chain and finding things in it: by slot, by index, by class, by walking."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import refiners.fluxion.layers as fl


class Block(fl.Chain):
    """A chain with a class name of its own."""


class Doubled(nn.Linear):
    """A class for a slot that was made for a Linear."""


def slots_of(chain: fl.Chain) -> list[str]:
    return list(chain._modules)


def small_tree() -> fl.Chain:
    """Linear_1, Residual(Linear_1, ReLU, Linear_2), Block(Block(Linear), SiLU), Linear_2."""
    return fl.Chain(
        fl.Linear(4, 4),
        fl.Residual(fl.Linear(4, 4), fl.ReLU(), fl.Linear(4, 4)),
        Block(Block(fl.Linear(4, 4)), fl.SiLU()),
        fl.Linear(4, 4),
    )


def paths(tree: fl.Chain, found: list[Any]) -> list[str]:
    names = {id(module): name for name, module in tree.named_modules()}
    return [names[id(module)] for module in found]


# --- building ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("container", [tuple, list, iter, lambda layers: (layer for layer in layers)])
def test_one_iterable_builds_the_same_chain_as_its_elements(container: Callable[[Any], Any]) -> None:
    layers = [nn.Linear(4, 4), fl.ReLU(), nn.Linear(4, 2)]
    chain = fl.Chain(container(layers))
    assert slots_of(chain) == ["Linear_1", "ReLU", "Linear_2"]
    assert list(chain) == layers
    x = torch.randn(3, 4)
    assert torch.equal(chain(x), layers[2](layers[1](layers[0](x))))


def test_an_empty_chain_returns_its_inputs() -> None:
    assert len(fl.Chain()) == 0
    assert fl.Chain([])(1, 2) == (1, 2)
    assert fl.Chain()(1) == 1


def test_a_single_sequential_is_a_child_not_an_iterable() -> None:
    assert slots_of(fl.Chain(nn.Sequential(nn.ReLU()))) == ["Sequential"]


def test_slots_are_numbered_only_where_a_class_occurs_twice() -> None:
    chain = fl.Chain(fl.ReLU(), nn.Linear(1, 1), fl.ReLU(), fl.Linear(1, 1), fl.Identity())
    assert slots_of(chain) == ["ReLU_1", "Linear_1", "ReLU_2", "Linear_2", "Identity"]


def test_classes_whose_name_ends_in_a_number_do_not_swallow_a_sibling() -> None:
    numbered = type("Block_1", (fl.Chain,), {})
    children = [Block(), Block(), numbered()]
    chain = fl.Chain(children)
    assert list(chain) == children
    assert len(set(slots_of(chain))) == 3


@pytest.mark.parametrize("wrong", [3, "Linear", None, nn.Linear, [3]])
def test_building_from_what_is_no_module_says_so(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"modules, not (int|str|NoneType|type)"):
        fl.Chain(wrong)


# --- indexing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(-4, 4))
def test_an_int_counts_as_in_a_list(index: int) -> None:
    chain = small_tree()
    assert chain[index] is list(chain.children())[index]


@pytest.mark.parametrize("index", [4, -5, 100])
def test_an_index_beyond_the_ends_names_the_length(index: int) -> None:
    with pytest.raises(IndexError, match=rf"4 children.*{index}"):
        small_tree()[index]


def test_a_str_is_a_slot_or_a_current_class() -> None:
    chain = fl.Chain(nn.Linear(4, 4), nn.Linear(4, 4))
    new = Doubled(4, 4)
    chain.replace(chain["Linear_1"], new)
    assert chain["Linear_1"] is new
    assert chain["Doubled"] is new
    assert chain["Linear"] is chain["Linear_2"] is chain[1]  # the only one of its class now


def test_an_unknown_str_names_the_children() -> None:
    with pytest.raises(KeyError, match=r"no child 'Conv2d'.*Linear_1, Residual, Block, Linear_2"):
        small_tree()["Conv2d"]


def test_a_key_of_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match="int, str or slice, not float"):
        small_tree()[1.5]


@pytest.mark.parametrize("empty", [fl.Chain, nn.Sequential, nn.ModuleList])
def test_an_empty_container_is_found_by_its_slot(empty: type[nn.Module]) -> None:
    chain = fl.Chain(empty(), empty())
    second = chain[1]
    chain.replace(chain[0], fl.Identity())
    assert chain[f"{empty.__name__}_2"] is second
    assert getattr(chain, f"{empty.__name__}_2") is second


@pytest.mark.parametrize("key", [slice(None), slice(1, 3), slice(-2, None), slice(None, None, -1), slice(9, None)])
def test_a_slice_picks_as_from_a_list_and_shares_leaves(key: slice) -> None:
    leaves = [fl.Linear(4, 4), fl.ReLU(), fl.Linear(4, 4), fl.SiLU()]
    chain = fl.Chain(leaves)
    part = chain[key]
    assert type(part) is fl.Chain
    assert list(part) == leaves[key]


def test_a_slice_runs_what_it_shows() -> None:
    chain, x = small_tree(), torch.randn(2, 4)
    assert torch.equal(chain[2:](chain[:2](x)), chain(x))


# --- adding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [fl.Chain, nn.Sequential, lambda *layers: list(layers)])
def test_plus_joins_in_order(other: Callable[..., Any]) -> None:
    first, second = fl.Chain(nn.Linear(4, 4), fl.ReLU()), [nn.Linear(4, 4), nn.Linear(4, 2)]
    joined = first + other(*second)
    assert slots_of(joined) == ["Linear_1", "ReLU", "Linear_2", "Linear_3"]
    assert list(joined) == [*first, *second]
    assert joined(torch.randn(3, 4)).shape == (3, 2)


@pytest.mark.parametrize("wrong", [3, ["text"], None])
def test_plus_something_else_is_a_type_error_that_says_what_came(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"modules, not (int|str|NoneType)|unsupported operand"):
        fl.Chain(fl.ReLU()) + wrong


# --- attributes -------------------------------------------------------------------------------------------------------


def test_slots_are_attributes_however_deep() -> None:
    tree = small_tree()
    assert tree.Residual.Linear_2 is tree[1][2]
    assert tree.Block.Block.Linear is tree[2][0][0]


def test_the_class_that_sits_in_a_slot_now_is_an_attribute_too() -> None:
    tree = small_tree()
    tree.replace(tree.Linear_1, Doubled(4, 4))
    assert tree.Doubled is tree.Linear_1 is tree[0]
    assert "Doubled" in dir(tree)
    assert "Doubled.weight" not in tree.state_dict()


def test_an_unknown_attribute_is_an_attribute_error_that_names_it() -> None:
    with pytest.raises(AttributeError, match=r"Block.*Conv2d"):
        _ = Block(fl.ReLU()).Conv2d
    assert not hasattr(small_tree(), "Conv2d")


def test_an_attribute_error_inside_a_property_is_shown_as_it_is() -> None:
    class WithProperty(fl.Chain):
        @property
        def broken(self) -> int:
            return self.no_such_thing

    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = WithProperty(fl.ReLU()).broken


# --- walking ----------------------------------------------------------------------------------------------------------


LINEARS = ["Linear_1", "Residual.Linear_1", "Residual.Linear_2", "Block.Block.Linear", "Linear_2"]


@pytest.mark.parametrize(
    ("predicate", "recurse", "expected"),
    [
        (fl.Linear, False, LINEARS),
        (nn.Linear, True, LINEARS),
        (Block, False, ["Block"]),
        (Block, True, ["Block", "Block.Block"]),
        ((fl.ReLU, fl.SiLU), False, ["Residual.ReLU", "Block.SiLU"]),
        ((fl.Residual, fl.Linear), False, ["Linear_1", "Residual", "Block.Block.Linear", "Linear_2"]),
        ((fl.Residual, fl.Linear), True, ["Linear_1", "Residual", *LINEARS[1:]]),
        (lambda module, parent: type(parent) is Block, False, ["Block.Block", "Block.SiLU"]),
        (None, False, ["Linear_1", "Residual", "Block", "Linear_2"]),
        (fl.Conv2d, True, []),
    ],
)
def test_walk_finds_depth_first_with_the_parent(predicate: Any, recurse: bool, expected: list[str]) -> None:
    tree = small_tree()
    found = list(tree.walk(predicate, recurse))
    assert paths(tree, [module for module, _ in found]) == expected
    assert all(any(child is module for child in parent) for module, parent in found)


def test_walk_without_a_predicate_and_recurse_visits_every_module_below() -> None:
    tree = small_tree()
    assert [module for module, _ in tree.walk(recurse=True)] == list(tree.modules())[1:]


def test_stop_iteration_prunes_one_subtree_only() -> None:
    def linear_but_not_in_residual(module: nn.Module, parent: fl.Chain) -> bool:
        if isinstance(module, fl.Residual):
            raise StopIteration
        return isinstance(module, fl.Linear)

    tree = small_tree()
    found = [module for module, _ in tree.walk(linear_but_not_in_residual)]
    assert paths(tree, found) == ["Linear_1", "Block.Block.Linear", "Linear_2"]


def test_walk_takes_no_string() -> None:
    with pytest.raises(TypeError, match="'Linear'"):
        list(small_tree().walk("Linear"))


def test_layers_and_find_agree_with_walk() -> None:
    tree = small_tree()
    assert paths(tree, list(tree.layers(fl.Linear))) == LINEARS
    assert paths(tree, list(tree.layers(Block, recurse=True))) == ["Block", "Block.Block"]
    assert tree.find(fl.Linear) is tree.ensure_find(fl.Linear) is tree[0]
    assert tree.find(fl.SiLU) is tree.Block.SiLU
    assert tree.find(fl.Conv2d) is None


def test_ensure_find_names_what_is_missing_and_what_is_there() -> None:
    with pytest.raises(ValueError, match=r"no Conv2d in this Chain.*Linear_1, Residual"):
        small_tree().ensure_find(fl.Conv2d)


def test_find_parent_gives_the_direct_parent() -> None:
    tree = small_tree()
    assert tree.find_parent(tree[0]) is tree
    assert tree.find_parent(tree.Residual.ReLU) is tree.ensure_find_parent(tree.Residual.ReLU) is tree.Residual
    assert tree.find_parent(fl.Linear(4, 4)) is None
    assert tree.find_parent(tree) is None
    with pytest.raises(ValueError, match="ReLU is not in this Chain"):
        tree.ensure_find_parent(fl.ReLU())


def test_parents_root_and_path_go_all_the_way_up() -> None:
    tree = small_tree()
    inner = tree.Block.Block
    assert inner.get_parents() == [tree.Block, tree]
    assert inner.root is tree and tree.root is tree
    assert inner.parent is tree.Block and tree.parent is None and tree.get_parents() == []
    assert (tree.get_path(), inner.get_path()) == ("Chain", "Chain.Block.Block")
    assert inner.get_path(top=tree.Block) == "Block.Block"
    with pytest.raises(ValueError, match="does not sit below"):
        inner.get_path(top=tree.Residual)


def test_a_module_in_no_chain_has_no_parent_to_ensure() -> None:
    with pytest.raises(AttributeError, match="UseContext sits in no Chain"):
        _ = fl.UseContext("a", "b").ensure_parent


def test_layer_takes_a_path_and_checks_the_class() -> None:
    tree = small_tree()
    assert tree.layer("Linear_1", fl.Linear) is tree.layer(0) is tree[0]
    assert tree.layer(["Block", 0, "Linear"], nn.Linear) is tree.Block.Block.Linear
    assert tree.layer((1, -1)) is tree.Residual.Linear_2
    with pytest.raises(TypeError, match=r"\['Block', 1\] is a SiLU, not a Linear"):
        tree.layer(["Block", 1], fl.Linear)
    with pytest.raises(KeyError, match="Residual has no child 'SiLU'"):
        tree.layer(["Residual", "SiLU"])


# --- device and dtype -------------------------------------------------------------------------------------------------


def test_device_and_dtype_are_those_of_the_first_parameter_or_buffer() -> None:
    assert fl.Chain(fl.ReLU()).device is None and fl.Chain(fl.ReLU()).dtype is None
    half = fl.Chain(fl.ReLU(), fl.Linear(2, 2, dtype=torch.float16, device="meta"), fl.Linear(2, 2))
    assert (half.device, half.dtype) == (torch.device("meta"), torch.float16)
    buffered = fl.Chain(fl.Chain(fl.Buffer(2, dtype=torch.bfloat16)))
    assert (buffered.device, buffered.dtype) == (torch.device("cpu"), torch.bfloat16)
    assert fl.Chain(fl.Buffer(2, dtype=torch.bfloat16), fl.Linear(2, 2)).dtype == torch.float32


# --- editing while walking --------------------------------------------------------------------------------------------


def test_a_sibling_removed_on_the_way_is_not_visited() -> None:
    tree = small_tree()
    visited = []
    for linear, parent in tree.walk(fl.Linear):
        visited.append(linear)
        if parent is tree.Residual and len(parent) == 3:
            parent.pop()
            tree.remove(tree.Block)
    assert visited == [tree.Linear_1, tree.Residual.Linear_1, tree.Linear_2]


def test_what_is_inserted_on_the_way_is_not_visited() -> None:
    tree = fl.Chain(fl.Linear(4, 4), fl.Chain(fl.Linear(4, 4)))
    visited = []
    for linear, parent in tree.walk(fl.Linear):
        visited.append(linear)
        parent.insert(0, fl.Linear(4, 4))
        parent.append(fl.Linear(4, 4))
    assert visited == [tree.Linear, tree.Chain.Linear]
    assert len(tree) == 4 and len(tree.Chain) == 3


def test_replacing_the_current_one_visits_each_place_once() -> None:
    tree = small_tree()
    names, before = list(tree.state_dict()), list(tree.layers(fl.Linear))
    for linear, parent in tree.walk(fl.Linear):
        parent.replace(linear, Doubled(4, 4))
    assert paths(tree, list(tree.layers(Doubled))) == LINEARS
    assert not any(now is old for now in tree.modules() for old in before)
    assert list(tree.state_dict()) == names


@pytest.mark.parametrize("recurse", [False, True])
def test_all_linears_can_be_wrapped_on_the_way(recurse: bool) -> None:
    tree, x = small_tree(), torch.randn(2, 4)
    linears, output = list(tree.layers(fl.Linear)), tree(x)
    for linear, parent in tree.walk(fl.Linear, recurse):
        gap = fl.Identity()
        parent.replace(linear, gap)
        parent.replace(gap, fl.Passthrough(linear) if linear is linears[0] else fl.Chain(linear))
    assert list(tree.layers(fl.Linear)) == linears
    assert tree.Residual.Linear_2.Linear is linears[2]
    tree.replace(tree[0], tree[0].pop())
    assert torch.equal(tree(x), output)
