"""How a tree is printed: a line for each module, repeats folded, parameters counted."""

import time
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import refiners.fluxion.layers as fl
from refiners.fluxion.tree import readable_count


class Block(fl.Chain):
    """A chain with a class name of its own, and words of its own."""

    def __init__(self, *layers: nn.Module, words: str = "") -> None:
        super().__init__(*layers)
        self.words = words

    def extra_repr(self) -> str:
        return self.words


def lines_of(tree: nn.Module) -> list[str]:
    return repr(tree).split("\n")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (1_000, "1k"),
        (1_234, "1.23k"),
        (12_345, "12.3k"),
        (999_499, "999k"),
        (999_501, "1M"),
        (1_000_000, "1M"),
        (859_520_964, "860M"),
        (999_600_000, "1G"),
        (6_500_000_000, "6.5G"),
        (999_000_000_000, "999G"),
    ],
)
def test_counts_have_three_digits(count: int, text: str) -> None:
    assert readable_count(count) == text


def test_a_tree_is_drawn_with_branches_slots_and_counts() -> None:
    tree = fl.Chain(
        fl.Linear(4, 4),
        fl.ReLU(),
        fl.Residual(Block(nn.Linear(4, 4, bias=False), words="deep"), fl.Identity()),
        fl.Linear(4, 4000),
    )
    assert lines_of(tree) == [
        "Chain(), 20k parameters, float32",
        "├── Linear_1: Linear(in_features=4, out_features=4, bias=True), 20 parameters",
        "├── ReLU()",
        "├── Residual(), 16 parameters",
        "│   ├── Block(deep), 16 parameters",
        "│   │   └── Linear(in_features=4, out_features=4, bias=False), 16 parameters",
        "│   └── Identity()",
        "└── Linear_2: Linear(in_features=4, out_features=4000, bias=True), 20k parameters",
    ]


def test_an_empty_tree_is_one_line() -> None:
    assert repr(fl.Chain()) == "Chain()"
    assert lines_of(fl.Chain(fl.Residual(), fl.ReLU())) == ["Chain()", "├── Residual()", "└── ReLU()"]


def test_equal_neighbours_are_folded_with_all_below_them() -> None:
    tree = fl.Chain(fl.Identity(), *(Block(fl.Linear(4, 4), fl.ReLU(), fl.ReLU()) for _ in range(12)))
    assert lines_of(tree) == [
        "Chain(), 240 parameters, float32",
        "├── Identity()",
        "└── 12 x Block() (Block_1 … Block_12), 20 parameters each",
        "    ├── Linear(in_features=4, out_features=4, bias=True), 20 parameters",
        "    └── 2 x ReLU() (ReLU_1 … ReLU_2)",
    ]


@pytest.mark.parametrize(
    "other",
    [
        lambda: Block(fl.Linear(4, 5)),
        lambda: Block(fl.Linear(4, 4), words="other"),
        lambda: Block(fl.Linear(4, 4), fl.ReLU()),
        lambda: Block(nn.Sequential(fl.Linear(4, 4))),
        lambda: fl.Residual(fl.Linear(4, 4)),
        lambda: Block(fl.Linear(4, 4, bias=False)),
    ],
)
def test_what_differs_somewhere_is_not_folded(other: type[Block]) -> None:
    tree = fl.Chain(Block(fl.Linear(4, 4)), other(), Block(fl.Linear(4, 4)))
    assert " x " not in repr(tree)
    assert sum(line.startswith(("├── ", "└── ")) for line in lines_of(tree)) == 3


def test_only_neighbours_are_folded() -> None:
    kinds = [fl.ReLU, fl.ReLU, fl.SiLU, fl.ReLU, fl.SiLU, fl.SiLU]
    assert lines_of(fl.Chain(kind() for kind in kinds))[1:] == [
        "├── 2 x ReLU() (ReLU_1 … ReLU_2)",
        "├── SiLU_1: SiLU()",
        "├── ReLU_3: ReLU()",
        "└── 2 x SiLU() (SiLU_2 … SiLU_3)",
    ]


def test_a_slot_is_named_where_its_class_does_not_tell_it() -> None:
    tree = fl.Chain(fl.Linear(4, 4), fl.ReLU())
    tree.replace(tree.ReLU, fl.SiLU())
    tree.insert(0, fl.ReLU())
    assert [line[4:].split("(")[0] for line in lines_of(tree)[1:]] == ["ReLU_2: ReLU", "Linear", "ReLU: SiLU"]


def test_shared_parameters_count_once_in_each_line() -> None:
    first, second = fl.Linear(4, 4), fl.Linear(4, 4)
    second.weight = first.weight
    lines = lines_of(fl.Chain(fl.Chain(first), fl.Residual(second, fl.ReLU()), fl.Linear(2, 2)))
    assert lines[0] == "Chain(), 30 parameters, float32"  # 16 shared, two biases of 4, and 6
    assert lines[1] == "├── Chain(), 20 parameters"
    assert lines[3] == "├── Residual(), 20 parameters"


def test_a_layer_in_two_slots_is_printed_in_both() -> None:
    shared = fl.Linear(4, 4)
    lines = lines_of(fl.Chain(shared, fl.ReLU(), shared))
    assert lines[0] == "Chain(), 20 parameters, float32"
    assert [line[4:12] for line in lines[1:]] == ["Linear_1", "ReLU()", "Linear_2"]


def test_all_dtypes_are_named() -> None:
    mixed = fl.Chain(fl.Linear(2, 2, dtype=torch.float64), fl.Chain(fl.Linear(2, 2, dtype=torch.bfloat16)))
    assert lines_of(mixed)[0] == "Chain(), 12 parameters, bfloat16, float64"


def test_trees_on_the_meta_device_print_without_memory() -> None:
    huge = fl.Chain(fl.Linear(100_000, 100_000, device="meta"))
    assert lines_of(huge)[0] == "Chain(), 10G parameters, float32"


def test_words_on_two_lines_stay_in_one() -> None:
    assert lines_of(fl.Chain(Block(words="one\ntwo"))) == ["Chain()", "└── Block(one two)"]


def test_a_chain_inside_a_foreign_module_prints_and_so_does_the_foreign_module() -> None:
    tree = fl.Chain(nn.Sequential(nn.Linear(2, 2), fl.Chain(nn.ReLU())))
    assert lines_of(tree)[1:] == [
        "└── Sequential(), 6 parameters",
        "    ├── 0: Linear(in_features=2, out_features=2, bias=True), 6 parameters",
        "    └── 1: Chain()",
        "        └── ReLU()",
    ]
    assert "ReLU()" in repr(nn.Sequential(tree))


def test_printing_follows_edits() -> None:
    tree = fl.Chain(Block(fl.ReLU()), Block(fl.ReLU()))
    assert len(lines_of(tree)) == 3
    tree.Block_2.append(fl.Linear(2, 2))
    assert "└── Block_2: Block(), 6 parameters" in lines_of(tree)


def test_a_tree_of_two_thousand_nodes_prints_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = fl.Chain(fl.Chain(fl.Chain(fl.Linear(2, 2 + i % 2), fl.ReLU()) for i in range(20)) for _ in range(34))
    total = len(list(tree.modules()))
    visits = 0
    original = nn.Module.named_parameters

    def counted(self: nn.Module, *args: bool, **kwargs: bool) -> Iterator[tuple[str, nn.Parameter]]:
        nonlocal visits
        visits += 1
        return original(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "named_parameters", counted)
    start = time.perf_counter()
    text = repr(tree)
    assert total > 2000 and text.count("\n") == 1 + 20 * 3
    assert visits <= 4 * total
    assert time.perf_counter() - start < 5
