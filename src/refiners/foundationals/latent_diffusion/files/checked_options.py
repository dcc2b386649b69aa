"""Options of a configuration file that our models do not have: each has to be at a value that makes no difference."""

from collections.abc import Mapping
from typing import Any

Config = Mapping[str, Any]


def check_fixed(config: Config, fixed: Mapping[str, tuple[Any, ...]], where: str) -> None:
    """Raise ValueError if an option is not at one of its values in `fixed`; the first is for options left out."""
    for option, values in fixed.items():
        value = config.get(option, values[0])
        if value not in values:
            raise ValueError(
                f"{where}: {option} is {value!r}, which this model cannot be (only {' or '.join(map(repr, values))}); "
                "it is another kind of model"
            )
