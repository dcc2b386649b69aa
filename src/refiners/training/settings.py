"""What all settings have in common: TOML in, each value checked before anything is loaded, one line per mistake."""

import difflib
import tomllib
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar, cast

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError

from refiners.training.clock import Period

T = TypeVar("T")


def _path(value: object) -> Path:
    if not isinstance(value, str | Path) or not str(value).strip():
        raise ValueError(f"{value!r} is no path; write one in quotation marks")
    return Path(value).expanduser()


def _existing_file(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"{str(path)!r}: there is no such file")
    return path


def _no_file(path: Path) -> Path:
    if path.exists() and not path.is_dir():
        raise ValueError(f"{str(path)!r} is a file; name a folder")
    return path


PeriodSetting = Annotated[Period, BeforeValidator(Period.parse), PlainSerializer(str)]
PathSetting = Annotated[Path, BeforeValidator(_path)]  # relative to where the command runs; ~ is the home folder
FileSetting = Annotated[PathSetting, AfterValidator(_existing_file)]
FolderSetting = Annotated[PathSetting, AfterValidator(_no_file)]  # is made where it is not there
TupleOf = Annotated[T, Field(strict=False)]  # of what TOML has as an array
TextSetting = Annotated[str, Field(min_length=1)]


class ConfigError(ValueError):
    """Settings that make no sense; the message names each of them."""


class Section(BaseModel):
    """A table of a TOML file. Unknown keys are refused, and so are values of another type: true is no number."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=True, allow_inf_nan=False
    )

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a TOML file. Raises FileNotFoundError, or ConfigError with a line for each mistake."""
        return cls.read(read_toml(path), where=str(path))

    @classmethod
    def read(cls, table: Mapping[str, Any], where: str = "config") -> Self:
        """Check a table. Raises ConfigError with a line for each mistake."""
        try:
            return cls.model_validate(table)
        except ValidationError as error:
            mistakes = [_describe(cls, cast("dict[str, Any]", mistake)) for mistake in error.errors()]
            raise ConfigError("\n".join(f"{where}: {mistake}" for mistake in mistakes)) from None


def read_toml(path: Path | str) -> dict[str, Any]:
    """The table of a TOML file. Raises FileNotFoundError if it is not there, ConfigError if it is no TOML."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such config file; copy one from configs/ and edit it")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors put a mark before UTF-8
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: this is no TOML file: {error}") from error


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings that differ between two dumped configs, by dotted name: (before, after), None where there is none.

    >>> differences({"lora": {"rank": 4, "alpha": 1}}, {"lora": {"rank": 8, "alpha": 1}})
    {'lora.rank': (4, 8)}
    """
    left, right = _flatten(before), _flatten(after)
    names = dict.fromkeys([*left, *right])
    return {name: (left.get(name), right.get(name)) for name in names if left.get(name) != right.get(name)}


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a name that is not known: the nearest known one, or all of them."""
    names = sorted(known)
    same = [each for each in names if each.lower() == name.lower()]
    close = same or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(names)}"


def _flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(cast("Mapping[str, Any]", value), f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _describe(model: type[BaseModel], mistake: Mapping[str, Any]) -> str:
    path = [str(part) for part in mistake["loc"]]
    name, section = ".".join(path), _section_at(model, path[:-1])
    if mistake["type"] == "extra_forbidden":
        known = section.model_fields if section else {}
        where = f"[{'.'.join(path[:-1])}]" if len(path) > 1 else "the config"
        return f"{where} has no setting {path[-1]!r}; {nearest(path[-1], known)}"
    if mistake["type"] == "missing":
        return f"{name} is missing; it has no default, so give it"
    if mistake["type"] == "value_error":
        reason = str(mistake["ctx"]["error"])
        return f"{name}: {reason}" if name else reason
    if mistake["type"] in ("model_type", "dict_type"):
        return f"{name} = {mistake['input']!r}: it should be a section, [{name}], with settings of its own"
    if mistake["type"] in ("tuple_type", "list_type"):
        return f"{name} = {mistake['input']!r}: it should be an array, in square brackets"
    reason = mistake["msg"][0].lower() + mistake["msg"][1:].replace("Input should", "it should")
    reason = reason.replace("input should", "it should")
    return f"{name} = {mistake['input']!r}: {reason}"


def _section_at(model: type[BaseModel], path: list[str]) -> type[BaseModel] | None:
    found: type[BaseModel] | None = model
    for part in path:
        field = found.model_fields.get(part) if found else None
        found = _section_of(field.annotation) if field else None
    return found


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The class of a section behind `Section`, `Section | None` and the like."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_section_of(part) for part in typing.get_args(annotation))
    return next((section for section in found if section is not None), None)
