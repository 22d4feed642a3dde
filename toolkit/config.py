"""One frozen dataclass is the configuration, the command-line options and the manifest.

A field states its default, help and limits once:

    @dataclass(frozen=True)
    class Options(Config):
        threshold: float = option(0.9, "cosine above which a row repeats an earlier one", minimum=-1, maximum=1)

`Config.from_mapping` reads YAML or `--param key=value` pairs: unknown keys and wrong types are refused, naming the
key, the value and the nearest match.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from xpert.errors import BadInput, unknown

__all__ = ["Config", "field_type", "option", "read_yaml"]

_TRUE = {"true", "yes", "on", "1"}
_FALSE = {"false", "no", "off", "0"}


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """A configuration field. `minimum` and `maximum` are inclusive."""
    metadata = {"help": help, "choices": choices, "minimum": minimum, "maximum": maximum}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Config:
    """Base of every configuration; subclasses are frozen dataclasses whose fields come from `option`."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_limits(field, getattr(self, field.name))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, where: str | None = None) -> Self:
        """Builds the configuration from untyped values; raises BadInput for an unknown key or a wrong type."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        typed: dict[str, Any] = {}
        for key, value in values.items():
            name = key.replace("-", "_")
            if name not in fields:
                raise unknown("parameter", key, (n.replace("_", "-") for n in fields), where=where)
            typed[name] = _convert(name, value, *field_type(cls, name), where=where)
        try:
            return cls(**typed)
        except BadInput as error:
            if where and not error.where:
                error.where = where
            raise

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for a manifest."""
        return {key: _plain(value) for key, value in dataclasses.asdict(self).items()}


def field_type(cls: type[Config], name: str) -> tuple[type, bool, bool]:
    """(element type, may be None, is a tuple) of a field declared as T, T | None or tuple[T, ...]."""
    hint = typing.get_type_hints(cls)[name]
    optional = False
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        members = [member for member in typing.get_args(hint) if member is not type(None)]
        optional, hint = True, members[0]
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], optional, True
    return hint, optional, False


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping, as given by `--config`; an empty file is an empty mapping."""
    import yaml

    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput("no such configuration file", where=str(path)) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise BadInput(f"not valid YAML: {reason}", where=str(path)) from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise BadInput("a configuration file holds `option: value` lines", where=str(path))
    return {str(key).replace("-", "_"): value for key, value in loaded.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _convert(name: str, value: Any, kind: type, optional: bool, many: bool, *, where: str | None) -> Any:
    if value is None or (optional and isinstance(value, str) and value.lower() in ("none", "null")):
        if optional:
            return None
        raise BadInput(f"{name} may not be empty", where=where)
    if many:
        items = (value.split(",") if value else []) if isinstance(value, str) else list(value)
        return tuple(_convert(name, item, kind, False, False, where=where) for item in items)
    if isinstance(value, kind) and not (kind is not bool and isinstance(value, bool)):
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    try:
        if kind is bool and isinstance(value, str) and value.lower() in _TRUE | _FALSE:
            return value.lower() in _TRUE
        if kind in (int, float) and isinstance(value, str):
            return kind(value)
        if kind is Path and isinstance(value, str):
            return Path(value)
        if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
    except ValueError:
        pass
    expected = {int: "a whole number", float: "a number", bool: "true or false"}.get(kind, kind.__name__)
    raise BadInput(f"{name} must be {expected}, not {value!r}", where=where)


def _check_limits(field: dataclasses.Field[Any], value: Any) -> None:
    choices = field.metadata.get("choices")
    minimum, maximum = field.metadata.get("minimum"), field.metadata.get("maximum")
    name = field.name.replace("_", "-")
    if value is None:
        return
    if choices and value not in choices:
        raise unknown(name, str(value), choices)
    if minimum is not None and not value >= minimum:
        raise BadInput(f"{name} is {value}; the least is {minimum:g}")
    if maximum is not None and not value <= maximum:
        raise BadInput(f"{name} is {value}; the most is {maximum:g}")
