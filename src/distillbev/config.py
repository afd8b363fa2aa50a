"""The base of every configuration: frozen, strictly decoded, tagged by its class name."""

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
        raise ConfigError(f"{path}: no such file; expected a {config_type.__name__} written by a run") from None
    except (yaml.YAMLError, msgspec.ValidationError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: not a valid {config_type.__name__}: {reason}") from None
