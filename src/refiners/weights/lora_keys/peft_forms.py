"""Updates as peft holds them: what it calls their tensors, and the settings from which it makes their shapes again.

An adapter of peft holds one kind of update, with the same settings for all layers but for ranks and alphas.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from torch import Tensor

from refiners.weights.lora_keys.kinds import Kind
from refiners.weights.lora_keys.peft_parts import PEFT_MAGNITUDE, magnitude_of_peft
from refiners.weights.lora_keys.settings import CAYLEY_TERMS
from refiners.weights.lora_keys.updates import LoraUpdate

Number = TypeVar("Number", int, float)
Updates = Mapping[str, LoraUpdate]  # by what peft calls the layer
Settings = dict[str, object]


def peft_name(update: LoraUpdate) -> str:
    """What peft calls the layer, from the component on."""
    return update.place.names[0].removeprefix(update.place.component.hidden)


def peft_tensors(update: LoraUpdate) -> dict[str, Tensor]:
    """The tensors by what peft's keys end in. Raises ValueError if peft has no place for such an update."""
    ends, kernel = _form_of(update).ends, update.place.shape[2:]
    tensors: dict[str, Tensor] = {}
    for part, tensor in update.tensors.items():
        if part == "magnitude":
            tensor = magnitude_of_peft(tensor, len(update.place.shape))
        elif part == "s":
            tensor = tensor.reshape((1, -1) if kernel else (-1, 1))
        elif part == "w2":
            tensor = tensor.reshape(*tensor.shape[:2], *kernel)
        if part not in ("terms", "on_input"):  # which are in the settings
            tensors[ends[part]] = tensor
    return tensors


def peft_settings(updates: Sequence[LoraUpdate]) -> Settings:
    """The settings of peft's configuration for these updates of one component.

    Raises ValueError if one adapter of peft cannot hold them all.
    """
    forms = [_form_of(update) for update in updates]
    for update, form in zip(updates, forms, strict=True):
        if form.peft_type != forms[0].peft_type:
            first = f"that of {updates[0].place.path} {updates[0].shown_kind.with_article}"
            raise _refusal(update, f"is {update.shown_kind.with_article}, {first}, and an adapter of peft has one kind")
    named = {peft_name(update): update for update in updates}
    return {"peft_type": forms[0].peft_type, "target_modules": sorted(named), **forms[0].settings(named)}


# -- LoRA, DoRA, LoHa, LoKr


def _lora_settings(updates: Updates) -> Settings:
    doras = [update for update in updates.values() if "magnitude" in update.tensors]
    plain = next((update for update in updates.values() if "magnitude" not in update.tensors), None)
    if doras and plain is not None:  # peft would make it one, of the base's magnitudes
        raise _refusal(plain, f"is no DoRA, that of {doras[0].place.path} is one, and peft has all or none")
    ranks, alphas = _ranks_and_alphas(updates)
    return _patterns(ranks, alphas, "lora_alpha") | {"lora_dropout": 0.0, "bias": "none", "use_dora": bool(doras)}


def _loha_settings(updates: Updates) -> Settings:
    return _patterns(*_ranks_and_alphas(updates), "alpha") | _tucker_settings(updates.values(), "t1")


def _lokr_settings(updates: Updates) -> Settings:
    sizes = {name: _kronecker_sizes(update) for name, update in updates.items()}
    factor = _decompose_factor(updates, sizes)
    is_halved = any("w1" not in update.tensors for update in updates.values())
    ranks, alphas = _ranks_and_alphas(updates)
    for name, update in updates.items():
        if {"w1", "w2"} <= update.tensors.keys():
            # at such a rank peft has no factors; it multiplies by alpha / rank, which has no effect here
            ranks[name] = max(*sizes[name][0], *sizes[name][1])
            alphas[name] = float(ranks[name])
        has_factors = [2 * ranks[name] < max(pair) for pair in sizes[name]]
        if [is_halved and has_factors[0], has_factors[1]] != [part not in update.tensors for part in ("w1", "w2")]:
            raise _refusal(update, "has other matrices as products than peft at its rank")
    of_products = [update for update in updates.values() if "w2" not in update.tensors]
    return {
        **_patterns(ranks, alphas, "alpha"),
        "decompose_both": is_halved,
        "decompose_factor": factor,
        **_tucker_settings(of_products, "t2"),
    }


def _ranks_and_alphas(updates: Updates) -> tuple[dict[str, int], dict[str, float]]:
    ranks = {name: update.rank or 0 for name, update in updates.items()}
    return ranks, {
        name: float(update.rank or 0) if update.alpha is None else update.alpha for name, update in updates.items()
    }


def _patterns(ranks: Mapping[str, int], alphas: Mapping[str, float], alpha_name: str) -> Settings:
    """The most usual rank and alpha, and those that differ."""
    rank, alpha = _most_usual(ranks.values()), _most_usual(alphas.values())
    return {
        "r": rank,
        alpha_name: alpha,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
    }


def _most_usual(values: Iterable[Number]) -> Number:
    return Counter(values).most_common(1)[0][0]


def _tucker_settings(updates: Iterable[LoraUpdate], core: str) -> Settings:
    """Whether convolutions with kernels have cores: in peft, all or none."""
    spatial = [update for update in updates if math.prod(update.place.shape[2:]) > 1]
    with_core = [update for update in updates if core in update.tensors]
    if with_core:
        for update in {id(update): update for update in (*spatial, *with_core)}.values():
            if (core in update.tensors) != (math.prod(update.place.shape[2:]) > 1):
                has = "has the core" if core in update.tensors else "has no core"
                raise _refusal(update, f"{has} of a Tucker decomposition, where peft goes by the kernels of layers")
    return {"use_effective_conv2d": bool(with_core)}


Sizes = tuple[tuple[int, int], tuple[int, int]]


def _kronecker_sizes(update: LoraUpdate) -> Sizes:
    """Of the two matrices, each outputs and inputs."""
    parts = update.tensors
    o1, i1 = (parts[part].shape[axis] for axis, part in enumerate(("w1", "w1") if "w1" in parts else ("w1_a", "w1_b")))
    return (o1, i1), (update.place.shape[0] // o1, update.place.shape[1] // i1)


def _decompose_factor(updates: Updates, sizes: Mapping[str, Sizes]) -> int:
    """The setting from which peft comes to these sizes; -1, its usual one, if that does."""
    factors = (-1, *sorted({size for pairs in sizes.values() for pair in pairs for size in pair}))
    misfits = {factor: [name for name in sizes if not _gives(factor, sizes[name])] for factor in factors}
    best = min(factors, key=lambda factor: len(misfits[factor]))
    if misfits[best]:
        name = misfits[best][0]
        of_most = f"no factor of peft gives that and the sizes of all other layers ({best} gives the most)"
        raise _refusal(updates[name], f"has a first matrix of {sizes[name][0]}, and {of_most}")
    return best


def _gives(factor: int, sizes: Sizes) -> bool:
    (o1, i1), (o2, i2) = sizes
    return (_first_factor(o1 * o2, factor), _first_factor(i1 * i2, factor)) == (o1, i1)


def _first_factor(size: int, factor: int) -> int:
    """How peft divides a size: by the factor, or by the largest divisor up to it and to the square root."""
    if factor > 0 and size % factor == 0:
        return factor
    most = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    return next(divisor for divisor in range(most, 0, -1) if size % divisor == 0)


# -- OFT, BOFT, (IA)^3


def _oft_settings(updates: Updates) -> Settings:
    widths = {name: math.prod(update.place.shape[1:]) for name, update in updates.items()}
    blocks = {name: update.tensors["blocks"] for name, update in updates.items()}
    sizes = {name: (1 + math.isqrt(1 + 8 * tensor.shape[1])) // 2 for name, tensor in blocks.items()}
    for update in updates.values():
        if math.prod(update.place.shape[2:]) > 1:
            raise _refusal(update, "is an OFT of a kernel, where peft runs something else than the turned weight")
    shared = {len(tensor) == 1 for name, tensor in blocks.items() if sizes[name] < widths[name]} or {False}
    terms = {int(update.tensors.get("terms", CAYLEY_TERMS)) for update in updates.values()}
    if len(shared) > 1 or len(terms) > 1:
        what = "one block for all in some layers only" if len(shared) > 1 else f"series of {sorted(terms)} terms"
        raise _refusal(next(iter(updates.values())), f"is one of several OFTs with {what}")
    (has_one_block,), (count,) = shared, terms
    series = {"num_cayley_neumann_terms": count} if count else {}
    return {
        **_block_settings(updates, sizes, widths, ("oft_block_size", "r"), is_nearest=True),
        "block_share": has_one_block,
        "use_cayley_neumann": bool(count),
        **series,
    }


def _boft_settings(updates: Updates) -> Settings:
    widths = {name: math.prod(update.place.shape[1:]) for name, update in updates.items()}
    sizes = {name: update.tensors["R"].shape[-1] for name, update in updates.items()}
    stages = {update.tensors["R"].shape[0] for update in updates.values()}
    if len(stages) > 1:
        raise _refusal(next(iter(updates.values())), f"is one of several BOFTs with {sorted(stages)} stages")
    names = ("boft_block_size", "boft_block_num")
    return {**_block_settings(updates, sizes, widths, names, is_nearest=False), "boft_n_butterfly_factor": stages.pop()}


def _block_settings(
    updates: Updates, sizes: Mapping[str, int], widths: Mapping[str, int], names: tuple[str, str], is_nearest: bool
) -> Settings:
    """The size of all blocks, or how many there are in each layer; the other of the two settings is 0.

    is_nearest: whether peft takes the nearest divisor of a width if a setting divides it not.
    """
    wanted = [sizes, {name: widths[name] // size for name, size in sizes.items()}]
    for index, numbers in enumerate(wanted):
        for number in sorted(set(numbers.values())):
            if all(
                numbers[name] == (_nearest_divisor(width, number) if is_nearest else number)
                for name, width in widths.items()
            ):
                return {names[index]: number, names[1 - index]: 0}
    found = ", ".join(map(str, sorted(set(sizes.values()))))
    raise _refusal(
        next(iter(updates.values())), f"is one of several with blocks of sizes that peft cannot mix: {found}"
    )


def _nearest_divisor(size: int, wanted: int) -> int:
    divisors = (divisor for divisor in range(1, size + 1) if size % divisor == 0)
    return min(divisors, key=lambda divisor: (abs(divisor - wanted), divisor))


def _ia3_settings(updates: Updates) -> Settings:
    return {"feedforward_modules": sorted(name for name, update in updates.items() if _is_on_input(update))}


def _is_on_input(update: LoraUpdate) -> bool:
    numbers, (out, inner, *kernel) = update.tensors["l"], update.place.shape
    if not kernel:
        return numbers.shape == (1, inner)
    is_said = update.tensors.get("on_input")
    return bool(is_said) if is_said is not None else numbers.numel() != out


# -- GLoRA


def _glora_settings(updates: Updates) -> Settings:
    forms = {
        setting: _shared_form(updates, paths)
        for setting, paths in {"config_A_B": "AB", "config_C": "C", "config_D_E": "DE"}.items()
    }
    ranks = {
        tensor.shape[1] for update in updates.values() for part, tensor in update.tensors.items() if part.endswith("Xd")
    }
    if len(ranks) > 1:
        found = ", ".join(map(str, sorted(ranks)))
        raise _refusal(next(iter(updates.values())), f"is one of several with ranks that peft cannot mix: {found}")
    return {"r": ranks.pop() if ranks else 8, **forms}


def _shared_form(updates: Updates, paths: str) -> str:
    """What peft calls the form that these paths have in all layers; C, D and E only where there is a bias."""
    found: dict[str, LoraUpdate] = {}
    for update in updates.values():
        for path in paths if paths == "AB" or update.place.has_bias else "":
            found[_form_of_path(update, path)] = update
    if len(found) > 1:
        shown = ", ".join(sorted(found))
        raise _refusal(list(found.values())[-1], f"has {' or '.join(paths)} in another form than others: {shown}")
    return next(iter(found), "none")


def _form_of_path(update: LoraUpdate, path: str) -> str:
    if f"{path}_Xd" in update.tensors:
        return "lora"
    whole = update.tensors.get(f"{path}_X")
    return "none" if whole is None else "constant" if whole.shape == (1,) else "vector"


# -- which kinds there are


class _Form(NamedTuple):
    """What peft calls a kind, and its tensors."""

    peft_type: str
    ends: dict[str, str]
    settings: Callable[[Updates], Settings]


def _named(stem: str, *parts: str) -> dict[str, str]:
    return {part: f"{stem}_{part}" for part in parts}


_LORA = _Form("LORA", {"down": "lora_A.weight", "up": "lora_B.weight", "magnitude": PEFT_MAGNITUDE}, _lora_settings)
_GLORA_ENDS = {f"{path}_{form}": f"glora_{path}.{form}" for path in "ABCDE" for form in ("X", "Xd", "Xu")}
_FORMS = {
    Kind.LORA: _LORA,
    Kind.EMBEDDING: _LORA._replace(ends=_LORA.ends | {"down": "lora_embedding_A", "up": "lora_embedding_B"}),
    Kind.LOHA: _Form("LOHA", _named("hada", "w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"), _loha_settings),
    Kind.LOKR: _Form("LOKR", _named("lokr", "w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"), _lokr_settings),
    Kind.ELEMENTWISE_GLORA: _Form("GLORA", _GLORA_ENDS, _glora_settings),
    Kind.OFT: _Form("OFT", {"blocks": "oft_R.weight"}, _oft_settings),
    Kind.BOFT: _Form("BOFT", _named("boft", "R", "s"), _boft_settings),
    Kind.IA3: _Form("IA3", _named("ia3", "l"), _ia3_settings),
}


def _form_of(update: LoraUpdate) -> _Form:
    """Raises ValueError if peft has no place for an update."""
    parts, reason = update.tensors, None
    magnitude = parts.get("magnitude")
    if update.kind not in _FORMS:
        reason = f"is {update.kind.with_article}"
    elif "mid" in parts:
        reason = "has the core of a Tucker decomposition"
    elif magnitude is not None and update.kind not in (Kind.LORA, Kind.EMBEDDING):
        reason = f"is a DoRA of {update.kind.with_article}"
    elif magnitude is not None and update.kind is Kind.LORA and magnitude.shape[:1] != update.place.shape[:1]:
        reason = "is a DoRA with a magnitude for each input"
    elif update.kind is Kind.OFT and ("blocks" not in parts or parts["blocks"].ndim != 2):
        reason = "is an OFT that turns outputs, where peft turns inputs"
    elif update.kind is Kind.IA3 and "l" not in parts:
        reason = "is an (IA)^3 that leaves out the bias, where peft has it"
    if reason:
        raise _refusal(update, reason)
    return _FORMS[update.kind]


def _refusal(update: LoraUpdate, reason: str) -> ValueError:
    return ValueError(f"the update of {update.place.path} {reason}: peft cannot hold that, write kohya's form")
