"""The base of every configuration: frozen, strictly decoded, tagged by its class name."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
import yaml

from .errors import ConfigError

ConfigT = TypeVar("ConfigT", bound="Config")


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag=True):
    """A frozen set of settings that checks itself once, in `__post_init__`.

    The tag (the class name, written as `type`) lets a field be a union of several configurations, so that a
    run can name its model by type; `msgspec.structs.replace` makes a variant.
    """


def write_config(config: Config, path: Path) -> None:
    """Writes every setting, defaults included, as YAML."""
    path.write_text(yaml.safe_dump(msgspec.to_builtins(config), sort_keys=False))


def read_config(path: Path, config_type: type[ConfigT]) -> ConfigT:
    """Reads what `write_config` wrote.

    Raises:
        ConfigError: the file is absent, is no YAML, lacks a key, has an unknown one or a value of another type.
    """
    try:
        return msgspec.convert(yaml.safe_load(path.read_text()), config_type)
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file; expected a {config_type.__name__} written by a run"
        ) from None
    except (yaml.YAMLError, msgspec.ValidationError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: not a valid {config_type.__name__}: {reason}") from None


def with_overrides(config: ConfigT, overrides: Sequence[str]) -> ConfigT:
    """The config with settings replaced by `dotted.key=value` texts; values are read as YAML.

    Raises:
        ConfigError: no `=`, a key that does not exist, or a value that does not fit.
    """
    values = msgspec.to_builtins(config)
    for override in overrides:
        key, equals, text = override.partition("=")
        *parents, last = key.split(".")
        target = values
        for parent in parents:
            target = target.get(parent) if isinstance(target, dict) else None
        if not equals or not isinstance(target, dict) or last not in target:
            known = sorted(target) if isinstance(target, dict) else sorted(values)
            raise ConfigError(f"--set {override}: expected KEY=VALUE with a known key, one of {known}")
        target[last] = yaml.safe_load(text)
    try:
        return msgspec.convert(values, type(config))
    except msgspec.ValidationError as error:
        raise ConfigError(f"--set {' '.join(overrides)}: {error}") from None
