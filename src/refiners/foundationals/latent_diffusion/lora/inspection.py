"""What a LoRA file is, and what it would do to a model, without reading its weights or touching the model."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from refiners.foundationals.latent_diffusion.lora.places import Patchable, find_layers
from refiners.foundationals.latent_diffusion.lora.report import AttachedUpdate, LoraReport, attached_update
from refiners.foundationals.latent_diffusion.lora.weights import assign_updates, fitted_update
from refiners.weights.formats import Identity, identify
from refiners.weights.lora_keys import (
    Kind,
    LeftOut,
    LoraFile,
    alpha_of,
    read_lora,
    split_key,
    starts_with_rank,
    strange_types,
)

_GENERAL = (Kind.LORA, Kind.WHOLE)  # parts that an update of a more special kind has as well


@dataclass(frozen=True)
class LoraInspection:
    """What a LoRA file is; its text is a summary.

    kinds: of updates, and how many layers have each. ranks: how many layers have each.
    alphas: in increasing order; there are none where the strength of every layer is 1.
    dtypes: how many tensors have each number format, alphas left out.
    strange: what peft calls adapters of kinds that cannot be loaded, if its settings say that this is one.
    report: what would attach to the model that was asked for; None if none was.
    """

    path: Path
    identity: Identity
    kinds: Mapping[Kind, int] = field(default_factory=dict[Kind, int])
    ranks: Mapping[int, int] = field(default_factory=dict[int, int])
    alphas: tuple[float, ...] = ()
    dtypes: Mapping[torch.dtype, int] = field(default_factory=dict[torch.dtype, int])
    strange: tuple[str, ...] = ()
    report: LoraReport | None = None

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} on {count} layers" for kind, count in self.kinds.items())
        ranks = ", ".join(f"{rank} on {count}" for rank, count in sorted(self.ranks.items()))
        alphas = ", ".join(f"{alpha:g}" for alpha in self.alphas)
        lines = [f"{self.path}: {self.identity}", f"  {kinds or 'no updates'}"]
        dtypes = ", ".join(f"{str(dtype).removeprefix('torch.')} in {count}" for dtype, count in self.dtypes.items())
        lines += [f"  number formats: {dtypes} tensors"] if dtypes else []
        lines += [f"  ranks: {ranks}"] if ranks else []
        lines += [f"  alphas: {alphas or 'those of the ranks'}"] if alphas or ranks else []
        lines += [f"  peft's {' and '.join(self.strange)}, which cannot be loaded"] if self.strange else []
        return "\n".join([*lines, *([f"  would do: {self.report}"] if self.report else [])])


def inspect_lora(lora: Path | str | LoraFile, model: Patchable | None = None) -> LoraInspection:
    """Say what a LoRA file or adapter folder is: family, format, kinds, number formats, ranks and alphas.

    lora: where it is, or what `read_lora` read. Files are mapped into memory, so their weights are not read.
    model: to say also what would attach to it, and what not and why.
    Raises ValueError if the file is damaged or no weights file, or has one part of a layer twice, FileNotFoundError if
    there is none.
    """
    file = lora if isinstance(lora, LoraFile) else read_lora(lora)
    identity = identify({key: tuple(tensor.shape) for key, tensor in file.tensors.items()})
    kinds: dict[str, Kind] = {}
    ranks: dict[str, int] = {}
    dtypes: Counter[torch.dtype] = Counter()
    stated = [alpha for own in file.settings.values() for alpha in (own.alpha, *own.alphas.values())]
    alphas = {alpha for alpha in stated if alpha is not None}
    for key, tensor in file.tensors.items():
        found = split_key(key)
        if found is not None and found.part == "alpha":
            alphas.add(_alpha(file, key))
            continue
        dtypes[tensor.dtype] += 1
        if found is None:
            continue
        if found.kind is not None and (found.kind not in _GENERAL or found.layer not in kinds):
            kinds[found.layer] = found.kind
        if tensor.ndim and starts_with_rank(found.kind, found.part):
            ranks[found.layer] = tensor.shape[0]
    return LoraInspection(
        path=file.path,
        identity=identity,
        kinds=Counter(kinds.values()),
        ranks=Counter(ranks.values()),
        alphas=tuple(sorted(alphas)),
        dtypes=dtypes,
        strange=tuple(strange_types(file.settings)),
        report=None if model is None else _foresee(file, model),
    )


def _alpha(file: LoraFile, key: str) -> float:
    try:
        return alpha_of(key, file.tensors[key])
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error


def _foresee(file: LoraFile, model: Patchable) -> LoraReport:
    layers = find_layers(model)
    contents = assign_updates(file, model, layers)
    attached: list[AttachedUpdate] = []
    left_out = list(contents.left_out)
    for update in contents.updates:
        try:
            fitted = fitted_update(update, layers[update.place.path].module)
        except ValueError as error:
            left_out.append(LeftOut(update.name, str(error)))
        else:
            attached.append(attached_update(fitted, next(iter(fitted.tensors.values())).dtype))
    return LoraReport(str(file.path), file.path.stem, tuple(attached), tuple(left_out))
