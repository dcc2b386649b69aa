"""The rules of names: every rule works both ways, every name is covered, dropped on purpose, or refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refiners.weights.rules import Names, UnknownNameError

words = st.text("abcXYZ_", min_size=1, max_size=6)
paths = st.lists(words, min_size=1, max_size=3).map(".".join)
numbers = st.integers(0, 120)
shifts = st.integers(0, 3)
suffixes = st.sets(st.sampled_from(["weight", "bias", "deep.er.weight", "0.weight", "3"]), min_size=1).map(
    lambda names: [(name, name) for name in sorted(names)]
)


Rules = dict[str, "str | tuple[str, Rules]"]
Case = tuple[Rules, list[tuple[str, str]]]


@st.composite
def rule_sets(draw: st.DrawFn, depth: int = 2) -> Case:
    """Rules, and examples of what they say: pairs of our name and theirs.

    No two rules meet: every path begins with a word of its own.
    """
    rules, examples = {}, []
    for index in range(draw(st.integers(1, 4))):
        ours, theirs, shift, value = f"O{index}{draw(words)}", f"t{index}{draw(words)}", draw(shifts), draw(numbers)
        inner_rules, inner = draw(rule_sets(depth - 1)) if depth and draw(st.booleans()) else (None, draw(suffixes))
        mine, yours = ours, theirs
        if draw(st.booleans()):
            ours, theirs = f"{ours}_{{n}}", f"{theirs}.{{n{-shift:+}}}" if shift else f"{theirs}.{{n}}"
            mine, yours = f"{mine}_{value + shift}", f"{yours}.{value}"
        rules[ours] = (theirs, inner_rules) if inner_rules else theirs
        examples += [(f"{mine}.{left}", f"{yours}.{right}") for left, right in inner]
    return rules, examples


def build(rules: Rules) -> Names:
    return Names({ours: to if isinstance(to, str) else (to[0], build(to[1])) for ours, to in rules.items()})


@given(rule_sets())
@settings(deadline=None, max_examples=50)
def test_rules_work_both_ways(case: Case) -> None:
    rules, examples = case
    names = build(rules)
    for ours, theirs in examples:
        assert names.to_theirs(ours) == theirs
        assert names.to_ours(theirs) == ours


@given(rule_sets(), paths, paths)
@settings(deadline=None, max_examples=20)
def test_a_prefix_is_a_rule_with_an_empty_path(case: Case, prefix: str, other: str) -> None:
    rules, examples = case
    names = build(rules)
    prefixed, swapped = Names({"": (prefix, names)}), Names({other: ("", names)})
    for ours, theirs in examples:
        assert prefixed.to_theirs(ours) == f"{prefix}.{theirs}" and prefixed.to_ours(f"{prefix}.{theirs}") == ours
        assert swapped.to_theirs(f"{other}.{ours}") == theirs and swapped.to_ours(theirs) == f"{other}.{ours}"


FIXED = Names(
    {
        "Layer_{n}": (
            "layers.{n-1}",
            Names({"Distribute.Linear_1": "q_proj", "Linear": "out_proj", "Cache": None}, dropped=["mask"]),
        ),
        "Grid_{row}_{column}": "grid.{column}.rows.{row+2}",
        "Twice_{n}": "twice.{n}.{n-1}",
        "Norm": "final.norm",
        "Scratch_{n}": None,
    },
    dropped=["position_ids", "buffers.{n}"],
)
STARTS = ["Layer_{}", "Layer_{}.Linear", "Layer_{}.Distribute.Linear_1", "Grid_{}_{}", "Twice_{}", "Norm", "Scratch_{}"]
STARTS += ["layers.{}", "layers.{}.out_proj", "layers.{}.q_proj", "grid.{}.rows.{}", "twice.{}.{}", "final.norm"]
figures = st.sampled_from(["0", "1", "2", "3", "01", "-1", "\u0663", "", "n", "1000000000", "9" * 5000])
any_name = st.builds(
    lambda start, first, second, rest: start.format(first, second) + rest,
    st.sampled_from(STARTS),
    figures,
    figures,
    st.one_of(st.sampled_from(["", ".", ".weight", "..weight", ".0", "x", "\n", ".\n"]), st.text(max_size=4)),
)


@given(any_name)
@settings(max_examples=200, deadline=None)
def test_any_name_is_renamed_and_back_or_dropped_or_refused(name: str) -> None:
    for there, back in ((FIXED.to_theirs, FIXED.to_ours), (FIXED.to_ours, FIXED.to_theirs)):
        try:
            renamed = there(name)
        except UnknownNameError:
            continue
        if renamed is not None:
            assert back(renamed) == name


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("Layer_1.Linear.weight", "layers.0.out_proj.weight"),
        ("Layer_12.Distribute.Linear_1.bias", "layers.11.q_proj.bias"),
        ("Grid_3_4.weight", "grid.4.rows.5.weight"),
        ("Twice_4", "twice.4.3"),
        ("Norm", "final.norm"),
    ],
)
def test_examples(ours: str, theirs: str) -> None:
    assert FIXED.to_theirs(ours) == theirs and FIXED.to_ours(theirs) == ours


@pytest.mark.parametrize("name", ["Layer_3.Cache", "Layer_3.Cache.k.v", "Scratch_7", "Scratch_7.weight"])
def test_what_only_we_have_is_dropped_on_the_way_out(name: str) -> None:
    assert FIXED.to_theirs(name) is None


@pytest.mark.parametrize("name", ["position_ids", "position_ids.x", "buffers.3", "layers.2.mask"])
def test_what_only_they_have_is_dropped_on_the_way_in(name: str) -> None:
    assert FIXED.to_ours(name) is None
    with pytest.raises(UnknownNameError):
        FIXED.to_theirs(name)


@pytest.mark.parametrize(
    "name",
    [
        "Layer_1",  # a block has no tensor itself
        "Layer_1.Linearx.weight",
        "xNorm.weight",
        "Norms.weight",
        "Layer_01.Linear.weight",
        "Layer_\u0663.Linear.weight",
        "Layer_-1.Linear.weight",
        "Layer_0.Linear.weight",  # would be layers.-1
        pytest.param("Layer_" + "9" * 5000 + ".Linear.weight", id="huge number"),
        "Norm.",
        "",
    ],
)
def test_what_no_rule_covers_is_refused(name: str) -> None:
    with pytest.raises(UnknownNameError, match="no rule covers"):
        FIXED.to_theirs(name)


def test_a_repeated_variable_must_repeat() -> None:
    with pytest.raises(UnknownNameError):
        FIXED.to_ours("twice.4.4")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("layers.7.q_prj.weight", "layers.{n-1}.q_proj"),
        ("final.nrm.bias", "final.norm"),
        ("grid.1.row.3", "grid.{column}.rows.{row+2}"),
    ],
)
def test_the_error_names_the_nearest_path(name: str, nearest: str) -> None:
    with pytest.raises(UnknownNameError) as raised:
        FIXED.to_ours(name)
    assert str(raised.value) == f"no rule covers {name!r}; the nearest known path is {nearest!r}"
    assert isinstance(raised.value, KeyError)


def test_without_rules_the_error_names_nothing() -> None:
    with pytest.raises(UnknownNameError, match=r"^no rule covers 'a'$"):
        Names({}).to_ours("a")


@pytest.mark.parametrize(
    ("ours", "theirs"), [("A_{n}", "a"), ("A", "a.{n}"), ("A_{n}", "a.{m}"), ("A_{n}_{m}", "a.{n}.{n}"), ("A_{n}", "")]
)
def test_both_sides_need_the_same_variables(ours: str, theirs: str) -> None:
    with pytest.raises(ValueError, match="must have the same variables on both sides"):
        Names({ours: theirs})
    with pytest.raises(ValueError, match="must have the same variables on both sides"):
        Names({ours: (theirs, FIXED)})


@pytest.mark.parametrize(("ours", "theirs"), [("A_{n}{m}", "a.{n}.{m}"), ("A_{n}_{m}", "a{n}{m-1}")])
def test_variables_need_something_between_them(ours: str, theirs: str) -> None:
    with pytest.raises(ValueError, match="must have something between any two variables"):
        Names({ours: theirs})


def test_a_name_is_never_empty() -> None:
    for rename in (Names({"": "prefix"}).to_ours, Names({"prefix": ""}).to_theirs):
        assert rename("prefix.weight") == "weight"
        with pytest.raises(UnknownNameError):
            rename("prefix")


def test_paths_lists_what_the_rules_speak_of() -> None:
    assert list(FIXED.paths())[:3] == ["Layer_{n}.Distribute.Linear_1", "Layer_{n}.Linear", "Layer_{n}.Cache"]
    assert list(FIXED.paths(is_ours=False)) == [
        "layers.{n-1}.q_proj",
        "layers.{n-1}.out_proj",
        "grid.{column}.rows.{row+2}",
        "twice.{n}.{n-1}",
        "final.norm",
    ]


@given(st.lists(st.tuples(paths, paths), min_size=1, max_size=5, unique_by=lambda pair: pair[0]), st.data())
@settings(deadline=None, max_examples=50)
def test_the_first_rule_that_covers_a_name_wins(pairs: list[tuple[str, str]], data: st.DataObject) -> None:
    name = f"{data.draw(st.sampled_from(pairs))[0]}.{data.draw(words)}"
    ours, theirs = next(pair for pair in pairs if name == pair[0] or name.startswith(f"{pair[0]}."))
    assert Names(dict(pairs)).to_theirs(name) == theirs + name.removeprefix(ours)


def test_a_rule_that_does_not_cover_what_is_below_leaves_it_to_the_next() -> None:
    names = Names({"A": ("a", Names({"X": "x"})), "A.Y": "why"})
    assert [names.to_theirs(name) for name in ("A.X.w", "A.Y.w")] == ["a.x.w", "why.w"]
    assert list(names.paths()) == ["A.X", "A.Y"]
