"""YAML without its traps: text that is read strictly, and written so that it is read as the same."""

import difflib
import re
from pathlib import Path
from typing import Any

import yaml

from detrlib.errors import ConfigError, in_one_line, shown


def read_yaml(path: Path) -> dict:
    """A YAML mapping; numbers such as 1e-4 are numbers. Raises ConfigError naming the file."""
    try:
        values = _parsed(path.read_text(encoding="utf-8-sig"))  # editors of Windows begin with a mark
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1, 0.0)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{path}: no such config file{hint}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not text in UTF-8 (byte {error.start}); save it so") from None
    except OSError as error:
        raise ConfigError(f"{path}: not readable as a config file ({error.strerror})") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected settings such as 'train: {{epochs: 2}}', found {type(values).__name__}")
    return values


def parse_value(value: Any) -> Any:
    """Text as YAML reads it ("1e-4" is a number, "[1, 2]" a list); anything else as it is.

    Raises ConfigError for text that is no YAML.
    """
    if not isinstance(value, str):
        return value
    try:
        return _parsed(value)
    except ConfigError as error:
        raise ConfigError(f"{shown(value, 120)} is {error}") from None


def _parsed(text: str) -> Any:
    """Text as YAML reads it. Raises ConfigError that says why it is none."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:  # the second of dates and of numbers that cannot be
        raise ConfigError(f"not valid YAML: {in_one_line(error)}") from None
    except RecursionError:
        raise ConfigError("not valid YAML: brackets within each other, too many of them") from None


def strict(loader: type[yaml.BaseLoader]) -> type[yaml.BaseLoader]:
    """Let a loader of PyYAML refuse what YAML forbids and PyYAML lets pass: a key twice, of which the later counts.

    So is a part that holds itself, for whose sake PyYAML fills mappings and lists later than it makes them.
    """
    loader.add_constructor("tag:yaml.org,2002:map", _whole_mapping)
    loader.add_constructor("tag:yaml.org,2002:seq", lambda own, node: own.construct_sequence(node, deep=True))
    return loader


def _whole_mapping(loader: yaml.BaseLoader, node: yaml.MappingNode) -> dict:
    seen = set()
    for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
        if key.value in seen:
            raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
        seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


@strict
class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as text; a float pattern of YAML 1.2 in front mends that."""


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"), list("-+0123456789.")
)


class Dumper(yaml.SafeDumper):
    """Quotes what the loader would read as a number, such as a class of the name 1e3."""


Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers
