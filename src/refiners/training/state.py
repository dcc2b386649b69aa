"""What a checkpoint keeps of a training, by the names of parameters and in full tensors, and how it is put back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from refiners.training.config import FREE_TO_CHANGE
from refiners.training.distributed import spread_as, whole
from refiners.training.settings import ConfigError, differences

_SETTINGS = ("lr", "betas", "eps", "weight_decay", "momentum")


def optimizer_state(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    """The state of each parameter, and the settings of each group with the names of its parameters."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    states = {
        names[id(parameter)]: {key: whole(value) if isinstance(value, Tensor) else value for key, value in each.items()}
        for parameter, each in optimizer.state.items()
    }
    groups = [
        {**group, "params": [names[id(parameter)] for parameter in group["params"]]} for group in optimizer.param_groups
    ]
    return {"states": states, "groups": groups}


def load_optimizer_state(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], saved: Mapping[str, Any]
) -> None:
    """Undo `optimizer_state`, on as many processes as there are now; what a config sets stays as it is now."""
    states: dict[str, dict[str, Any]] = {}
    for name, each in saved["states"].items():
        reference = parameters[name]
        states[name] = {
            key: spread_as(value, reference) if isinstance(value, Tensor) and value.shape == reference.shape else value
            for key, value in each.items()
        }
    names = {id(parameter): name for name, parameter in parameters.items()}
    homes = {name: group for group in saved["groups"] for name in group["params"]}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        inside = [names[id(parameter)] for parameter in group["params"]]
        set_now = {key: group[key] for key in _SETTINGS if key in group}
        groups.append({**homes[inside[0]], **set_now, "initial_lr": group["lr"], "params": inside})
    # torch goes by the order of the parameters, and takes anything for what they are called
    optimizer.load_state_dict({"state": states, "param_groups": groups})


def check_same_weights(path: Path, saved: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    """Raises ValueError if the weights of a checkpoint are not those that train."""
    lost, new = sorted(saved.keys() - parameters.keys()), sorted(parameters.keys() - saved.keys())
    if lost or new:
        raise ValueError(
            f"{path}: it holds {len(lost)} weights that do not train now (first: {lost[:1]}) and lacks {len(new)} that "
            f"do (first: {new[:1]}); choose another checkpointing.save_folder"
        )
    for name, weight in saved.items():
        if weight.shape != parameters[name].shape:
            raise ValueError(
                f"{path}: {name} has shape {tuple(weight.shape)} there, but {tuple(parameters[name].shape)} now; "
                "choose another checkpointing.save_folder"
            )


def check_same_config(
    path: Path, before: Mapping[str, Any], now: Mapping[str, Any], contents: tuple[str, str] = ("", "")
) -> None:
    """Raises ConfigError if settings that bear on the weights to come are not those of the checkpoint.

    contents: of the data, before and now, as `joined_contents` gives them.
    """
    changed = differences(before, now)
    matter = {name: values for name, values in changed.items() if not name.startswith(FREE_TO_CHANGE)}
    if matter:
        told = {name: f"{name} was {old!r} and is {new!r}" for name, (old, new) in matter.items()}
        if "data" in told and all(contents):
            told["data"] = _describe_change(*contents)
        listed = "; ".join(told.values())
        raise ConfigError(
            f"{path}: this checkpoint was made with other settings: {listed}; set them back, choose another "
            "checkpointing.save_folder, or set checkpointing.allow_changes = true"
        )


def joined_contents(batches: object) -> str:
    """What batches say that they hold, as one text, which costs a checkpoint next to nothing; "" if they do not."""
    return "\0".join(getattr(batches, "contents", ()))


def _describe_change(before: str, now: str) -> str:
    """What became other in data: how many samples there are, and which are new, gone, or new under the same name."""
    texts = [[entry.partition(" ") for entry in text.split("\0")] for text in (before, now)]
    old, new = ({digest: name for digest, _, name in entries} for entries in texts)
    gone = {name for digest, name in old.items() if digest not in new}
    come = {name for digest, name in new.items() if digest not in old}
    kinds = {"removed": gone - come, "added": come - gone, "changed": gone & come}
    told = [f"{len(names)} {kind} ({_first(names)})" for kind, names in kinds.items() if names]
    counts = f"the data were {len(texts[0])} samples and are {len(texts[1])}"
    return f"{counts}: {', '.join(told) or 'the same ones, in another order or number'}"


def _first(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")
