"""Settings from YAML files, their bases, and overrides.

A file holds only what differs from the defaults in `settings`, and may name another file as its `base`.
Precedence, lowest first: defaults < base < file < dotted overrides. Unknown keys are errors.

    cfg = load_config("papermill_runs/configs/shapes.yaml", {"train.epochs": 2})
"""

import difflib
import re
import types
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from detrlib.config.settings import Config, Section
from detrlib.errors import ConfigError

PROJECT = Path(__file__).resolve().parents[2]


def load_config(path: str | Path | None = None, overrides: dict[str, Any] | None = None) -> Config:
    """Settings from a YAML file (or the defaults) with dotted `overrides` such as {"train.epochs": 2}.

    A string override is read as YAML, so "1e-4" becomes a number and "[1, 2]" a list.
    Raises `ConfigError` naming the file and the setting, with the nearest valid name where one is unknown.
    """
    values = _read_yaml(project_path(path)) if path else {}
    for key, value in (overrides or {}).items():
        _check_known(key, "an override")
        _insert(values, key.split("."), parse_value(value))
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path or 'config'}: {_explain(error)}") from None


def save_config(cfg: Config, path: Path) -> None:
    """The whole of `cfg`, defaults included, so that a run folder needs no other file to be understood."""
    path.write_text(yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False))


def replace(cfg: Config, overrides: dict[str, Any]) -> Config:
    """A copy of `cfg` with dotted `overrides`, checked like a file."""
    values = cfg.model_dump(mode="json")
    for key, value in overrides.items():
        _check_known(key, "an override")
        _insert(values, key.split("."), parse_value(value))
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def changed_settings(cfg: Config, base: Config) -> dict[str, Any]:
    """Dotted settings of `cfg` that differ from those of `base`."""
    mine, theirs = flat_settings(cfg), flat_settings(base)
    return {key: value for key, value in mine.items() if value != theirs[key]}


def flat_settings(section: Section, prefix: str = "") -> dict[str, Any]:
    """Every dotted setting of a section with its value, as JSON has it."""
    flat = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        nested = isinstance(value, Section)
        flat |= flat_settings(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return flat


def project_path(path: str | Path) -> Path:
    """`path` as given when absolute, otherwise from the project root, whatever the working directory is."""
    path = Path(path).expanduser()
    return path if path.is_absolute() else PROJECT / path


def read_yaml(path: Path) -> dict:
    """A YAML mapping; numbers such as 1e-4 are numbers. Raises `ConfigError` naming the file."""
    try:
        values = yaml.load(path.read_text(), Loader=_Loader)
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1, 0.0)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{path}: no such config file{hint}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected settings such as 'train: {{epochs: 2}}', found {type(values).__name__}")
    return values


def _read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict:
    if path in seen:
        raise ConfigError(f"{path}: 'base' refers back to itself through {', '.join(p.name for p in seen)}")
    values = {key: value for key, value in read_yaml(path).items() if value is not None}  # a section left empty
    if "runs" in values:
        raise ConfigError(f"{path}: a sweep of several runs, no settings of one; use detrlib sweep {path}")
    base = values.pop("base", None)
    for key in _dotted(values):
        _check_known(key, str(path))
    return _merge(_read_yaml(path.parent / base, (*seen, path)), values) if base else values


def _merge(low: dict, high: dict) -> dict:
    """`high` over `low`, section by section."""
    merged = dict(low)
    for key, value in high.items():
        nested = isinstance(value, dict) and isinstance(low.get(key), dict)
        merged[key] = _merge(low[key], value) if nested else value
    return merged


def _dotted(values: dict, prefix: str = "") -> list[str]:
    keys = []
    for key, value in values.items():
        keys += _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [f"{prefix}{key}"]
    return keys


def _insert(values: dict, path: list[str], value: Any) -> None:
    *parents, last = path
    for name in parents:
        values = values.setdefault(name, {})
    values[last] = value


def known_settings(section: type[Section] = Config, prefix: str = "") -> list[str]:
    """Every dotted setting, for messages, documentation and completion."""
    names = []
    for name, field in section.model_fields.items():
        names.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            names += known_settings(field.annotation, f"{prefix}{name}.")
    return names


def _check_known(key: str, where: str) -> None:
    known = known_settings()
    if key in known:
        return
    last = key.split(".")[-1]
    near = difflib.get_close_matches(key, known, 1, 0.5)
    near = near or [k for k in known if k.split(".")[-1] in difflib.get_close_matches(last, [last, *_leaves(known)], 2)]
    hint = f"; did you mean '{near[0]}'?" if near else f"; sections are {', '.join(Config.model_fields)}"
    raise ConfigError(f"{where}: unknown setting '{key}'{hint}")


def _leaves(names: list[str]) -> list[str]:
    return [name.split(".")[-1] for name in names]


def parse_value(value: Any) -> Any:
    """Text as YAML reads it ("1e-4" is a number, "[1, 2]" a list); anything else as it is.

    Raises `ConfigError` for text that is no YAML.
    """
    if not isinstance(value, str):
        return value
    try:
        return yaml.load(value, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{value!r} is not valid YAML: {error}") from None


def _explain(error: ValidationError) -> str:
    lines = []
    for fault in error.errors():
        where = ".".join(str(part) for part in fault["loc"] if part in _leaves(known_settings()))
        given = "" if isinstance(fault["input"], dict | BaseModel) else f" (given {fault['input']!r})"
        message = fault["msg"].removeprefix("Value error, ")
        near = difflib.get_close_matches(str(fault["input"]), _choices(where), 1, 0.4) if given else []
        hint = f"; did you mean '{near[0]}'?" if near else ""
        lines.append(f"{where}: {message}{given}{hint}" if given else message)
    return "; ".join(dict.fromkeys(lines))


def _choices(setting: str) -> list[str]:
    section = Config
    *parents, last = setting.split(".")
    for name in parents:
        section = section.model_fields[name].annotation
    if last not in section.model_fields:
        return []
    annotation = section.model_fields[last].annotation
    parts = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else [annotation]
    return [str(c) for part in parts for c in typing.get_args(part)]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as text; a float pattern of YAML 1.2 in front mends that."""


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"), list("-+0123456789.")
)
