"""The base of every configuration: frozen, strictly decoded, tagged by its class name."""

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

from .errors import ConfigError

ConfigT = TypeVar("ConfigT", bound="Config")


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number; YAML 1.1 takes it for text, and PyYAML with it."""


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would take for a number."""


for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag=True):
    """A frozen set of settings that checks itself once, in `__post_init__`.

    The tag (the class name, written as `type`) lets a field be a union of several configurations, so that a
    run can name its model by type; `msgspec.structs.replace` makes a variant.
    """


def write_config(config: Config, path: Path) -> None:
    """Writes every setting, defaults included, as YAML; a reader never meets half a file."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(yaml.dump(msgspec.to_builtins(config), Dumper=_Dumper, sort_keys=False))
    part.replace(path)


def read_config(path: Path, config_type: type[ConfigT]) -> ConfigT:
    """Reads what `write_config` wrote.

    Raises:
        ConfigError: the file is absent, is no YAML, lacks a key, has an unknown one or a value of another type.
    """
    try:
        return msgspec.convert(yaml.load(path.read_text(), Loader=_Loader), config_type)
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file; expected a {config_type.__name__} written by a run"
        ) from None
    except (yaml.YAMLError, msgspec.ValidationError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{path}: not a valid {config_type.__name__}: {reason}; mend the file or restore what wrote it"
        ) from None


def with_overrides(config: ConfigT, overrides: Sequence[str]) -> ConfigT:
    """The config with settings replaced by `dotted.key=value` texts; values are read as YAML.

    Entries of lists go by number from 0, as in `distill.taps.0.student`.

    Raises:
        ConfigError: no `=`, a key that does not exist, or a value that does not fit.
    """
    values: Any = _with_lists(msgspec.to_builtins(config))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"--set {override}: expected KEY=VALUE, as in optim.steps=100")
        *parents, last = (int(part) if part.isdecimal() else part for part in key.split("."))
        target: Any = values
        for parent in parents:
            target = target[parent] if _has(target, parent) else None
        if not _has(target, last):
            near = difflib.get_close_matches(key, list(dict(_settings(values))), n=3, cutoff=0.5) or list(
                values
            )
            raise ConfigError(f"--set {override}: no setting {key!r}; the nearest: {', '.join(near)}")
        try:
            target[last] = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {override}: not a YAML value: {' '.join(str(error).split())}") from None
    try:
        return msgspec.convert(values, type(config))
    except msgspec.ValidationError as error:
        raise ConfigError(f"--set {' '.join(overrides)}: {error}") from None


def _with_lists(values: Any) -> Any:
    """Built-in values with lists for tuples, so that entries can be changed."""
    if isinstance(values, dict):
        return {key: _with_lists(value) for key, value in values.items()}
    return [_with_lists(value) for value in values] if isinstance(values, list | tuple) else values


def _has(values: Any, key: str | int) -> bool:
    """Whether built-in values are a table with this key, or a list with this entry."""
    return (
        key in values if isinstance(values, dict) else isinstance(values, list) and key in range(len(values))
    )


def first_difference(first: Config, second: Config) -> tuple[str, Any, Any] | None:
    """The first setting in which two configurations differ: its dotted key and both values; None if equal."""
    ours, theirs = (dict(_settings(msgspec.to_builtins(config))) for config in (first, second))
    for key in {**ours, **theirs}:
        if ours.get(key) != theirs.get(key):
            return key, ours.get(key), theirs.get(key)
    return None


def _settings(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every setting."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _settings(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
