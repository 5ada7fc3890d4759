"""Settings from YAML files, their bases, and overrides.

A file holds only what differs from the defaults in `settings`, and may name another file as its `base`.
Precedence, lowest first: defaults < base < file < dotted overrides. Unknown keys are errors.

    cfg = load_config("papermill_runs/configs/shapes.yaml", {"train.epochs": 2})
"""

import difflib
import re
import typing
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from shlex import quote
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from detrlib.config.section import Section
from detrlib.config.settings import FAMILIES, Config
from detrlib.config.yaml_text import Dumper, parse_value, read_yaml
from detrlib.errors import ConfigError, listed, shown

PROJECT = Path(__file__).resolve().parents[2]

PADDING = "model.compatibility.padding"
# Settings that have moved; files and overrides that use the old names keep working.
MOVED = {
    "model.backbone.mask_padding": PADDING,
    "model.compatibility.mask_padding": PADDING,
    "model.attention.padding": PADDING,
    "model.compatibility.attention_padding": PADDING,
    "model.deformable.token_scores": PADDING,
    "model.compatibility.token_scores": PADDING,
    "model.attention.alpha_clamped": "model.compatibility.alpha_clamped",
    "model.deformable.dam": "model.compatibility.dam",
}
# Parameters of published code that are twice a setting, and may be given in place of it.
DOUBLED = {"model.attention.tv_alpha": "model.attention.tv_lambda"}
# What three settings said before they were one; where they differ the last of these counts.
PADDING_WAS = {"exact": (True, "masked", "hidden"), "official": (False, "official"), "thesis": ("add_one",)}
# What is always so in a family that has no setting for it, and why; files that say so are right.
GIVEN = {
    "deformable": {
        "model.classification": ("sigmoid", "it is trained by focal losses, without a no-object class"),
        "model.queries": ("learned", "its queries have references of their own"),
        "model.norm": ("post", "its layers are those of the published weights"),
        "model.attention.encoder_self": ("softmax", "it samples points and scores no keys; choose decoder_self"),
        "model.attention.decoder_cross": ("softmax", "it samples points and scores no keys; choose decoder_self"),
        "model.attention.tv_lambda": (None, "it has no tvmax, whose keys form a grid"),
        "model.polling": (None, "it keeps fewer tokens by model.deformable.rho"),
        "model.registers": (None, "its encoder samples points of the image, and registers lie nowhere"),
    },
    "detr": {
        "model.deformable": (None, "set model.architecture to deformable"),
        "model.compatibility.dam": (None, "it scores no tokens; that is Sparse DETR"),
    },
    "huggingface": {
        "model.attention.": (None, "its heads are transformers' own"),
        "model.": (None, "transformers' configuration has its own names, which stand in model.options"),
    },
}
OPEN = "model.options."  # what stands below it has names of transformers'


def load_config(path: str | Path | None = None, overrides: dict[str, Any] | None = None) -> Config:
    """Read settings from a YAML file, its bases, and overrides.

    Args:
        path: a YAML file, relative to the project's root; None for the defaults.
        overrides: dotted settings such as {"train.epochs": 2}. Text is read as YAML, so that "1e-4" becomes a number
            and "[1, 2]" a list. Of a setting in a section and by its dotted name, the later one counts.

    Returns:
        The whole of the settings, checked and frozen.

    Raises:
        ConfigError: names the file and the setting, and the nearest valid name where one is unknown.
    """
    values = _read_with_bases(project_path(path)) if path else {}
    return _checked(_over(values, _overrides(overrides or {})), f"{path or 'config'}: ")


def replace(cfg: Config, overrides: dict[str, Any]) -> Config:
    """A copy of `cfg` with dotted `overrides`, checked like a file. Raises ConfigError naming the setting."""
    return _checked(_over(flat_settings(cfg), _overrides(overrides)), "")


def save_config(cfg: Config, path: Path) -> None:
    """Write the whole of `cfg`, defaults included, so that a run folder needs no other file to be understood."""
    path.write_text(yaml.dump(cfg.model_dump(mode="json"), Dumper=Dumper, sort_keys=False))


def changed_settings(cfg: Config, base: Config) -> dict[str, Any]:
    """Dotted settings of `cfg` that differ from those of `base`, or that `base` has not."""
    mine, theirs = flat_settings(cfg), flat_settings(base)
    return {key: value for key, value in mine.items() if key not in theirs or value != theirs[key]}


def flat_settings(section: Section, prefix: str = "") -> dict[str, Any]:
    """Every dotted setting of a section with its value, as JSON has it."""
    flat = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            flat |= flat_settings(value, f"{prefix}{name}.")
        else:
            flat |= dict(_flat(value, f"{prefix}{name}.")) if isinstance(value, dict) else {prefix + name: value}
    return flat


def project_path(path: str | Path) -> Path:
    """`path` as given when absolute, otherwise from the project root, whatever the working directory is."""
    path = Path(path).expanduser()
    return path if path.is_absolute() else PROJECT / path


# Reading


def _read_with_bases(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Dotted settings of a file over those of its base."""
    if path in seen:
        raise ConfigError(f"{path}: 'base' refers back to itself through {', '.join(p.name for p in seen)}")
    values = read_yaml(path)
    if "runs" in values:
        raise ConfigError(f"{path}: a sweep of several runs, no settings of one; use detrlib sweep {quote(str(path))}")
    base = values.pop("base", None)
    if not isinstance(base, str | None):
        raise ConfigError(f"{path}: base is {base!r}, expected the name of another file such as shapes.yaml")
    if twice := given_twice(values):
        raise ConfigError(f"{path}: {twice}")
    settings = _settings(values, str(path))
    return _over(_read_with_bases(path.parent / base, (*seen, path)), settings) if base else settings


def given_twice(values: dict[str, Any]) -> str | None:
    """In words, which setting stands twice in settings of one place, of which nobody can tell what was meant."""
    counts = Counter(key for key, _ in _flat(values))
    twice = next((key for key, count in counts.items() if count > 1), None)
    return f"{twice} is given twice, in a section and by its dotted name; keep one" if twice else None


def _settings(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Sections within each other, or dotted names, as dotted settings under their names of today."""
    given, settings, padding = dict(_flat(values)), {}, []
    for key, value in given.items():
        _check_known(key, where)
        if key in DOUBLED:
            settings[DOUBLED[key]] = _half(key, value, given, where)
            continue
        now = MOVED.get(key, key)
        if now == PADDING != key:
            if PADDING in given:
                raise ConfigError(f"{where}: {key} is an older name of what {PADDING} says now; give that alone")
            value = next((today for today, before in PADDING_WAS.items() if value in before), value)
            padding.append(value)
        settings[now] = value
    if padding:
        settings[PADDING] = max(padding, key=lambda value: [*PADDING_WAS, value].index(value))
    return settings


def _half(key: str, value: Any, given: dict[str, Any], where: str) -> float:
    """The setting that a parameter of published code is twice of."""
    if DOUBLED[key] in given:
        raise ConfigError(f"{where}: {key} is twice {DOUBLED[key]}; give one of them")
    if not isinstance(value, int | float):
        raise ConfigError(f"{where}: {key} is {value!r}; give a number, twice {DOUBLED[key]}")
    return value / 2


def _overrides(values: dict[str, Any]) -> dict[str, Any]:
    return _settings({key: parse_value(value) for key, value in values.items()}, "an override")


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _flat(value, f"{key}.")
        elif not (value is None and any(known.startswith(f"{key}.") for known in KNOWN)):  # a section left empty
            yield key, value


def _over(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    """`high` over `low`; where it names another architecture, only what that one knows is taken over from `low`."""
    family = high.get(ARCHITECTURE, low.get(ARCHITECTURE))
    if isinstance(family, str) and family in FAMILIES and family != low.get(ARCHITECTURE, "detr"):
        low = {key: value for key, value in low.items() if not key.startswith("model.") or _knows(family, key)}
    return low | high


# Checking


def known_settings(section: type[Section] = Config, prefix: str = "") -> list[str]:
    """Every dotted setting, those of all families of models, for messages, documentation and completion."""
    names: dict[str, None] = {}
    for name, field in section.model_fields.items():
        names[prefix + name] = None
        for inner in _sections_of(field.annotation):
            names |= dict.fromkeys(known_settings(inner, f"{prefix}{name}."))
    return list(names)


def _sections_of(annotation: Any) -> list[type[Section]]:
    """The sections that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [inner for part in typing.get_args(annotation) for inner in _sections_of(part)]


ARCHITECTURE = "model.architecture"
KNOWN = known_settings()
KNOWN_TO = {name: set(known_settings(family, "model.")) for name, family in FAMILIES.items()}
DEFAULTS = {name: flat_settings(family.model_construct(), "model.") for name, family in FAMILIES.items()}


def _knows(family: str, key: str) -> bool:
    return key in KNOWN_TO[family] or (family == "huggingface" and key.startswith(OPEN))


def _checked(settings: dict[str, Any], where: str) -> Config:
    """The settings as sections. Raises ConfigError naming the setting."""
    family = settings.get(ARCHITECTURE, "detr")
    family = family if isinstance(family, str) else repr(family)
    if family.startswith("faster_rcnn"):
        raise ConfigError(
            f"{where}{ARCHITECTURE} {family} is no model of this library any more; measure the detections of any "
            "detector with detrlib evaluate NAME --predictions FILE.json --data DATA"
        )
    values: dict[str, Any] = {}
    for key, value in settings.items():
        if family in FAMILIES and _is_given(key, value, family, where):
            continue
        *parents, last = key.split(".")
        section = values
        for name in parents:
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise ConfigError(f"{where}{key}: {name} is a section of settings, but is given as {section!r}")
        section[last] = value
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(where + _explain(error)) from None


def _is_given(key: str, value: Any, family: str, where: str) -> bool:
    """Whether a setting is of another family and says what is always so in this one.

    Raises ConfigError when it says something else.
    """
    if not key.startswith("model.") or _knows(family, key):
        return False
    theirs = "set model.architecture to huggingface"
    always, reason = next((said for start, said in GIVEN[family].items() if key.startswith(start)), (None, theirs))
    elsewhere = [defaults[key] for defaults in DEFAULTS.values() if key in defaults]
    if value in (elsewhere if always is None else [always]):
        return True
    wanted = f"leave {key} at {always}" if always else f"leave {key} out"
    raise ConfigError(f"{where}{key} {value!r} is of no use to {ARCHITECTURE} {family}: {reason}; {wanted}")


def _check_known(key: str, where: str) -> None:
    if key in KNOWN or key in MOVED or key in DOUBLED or key.startswith(OPEN):
        return
    last = key.split(".")[-1]
    near = difflib.get_close_matches(key, KNOWN, 1, 0.5)
    leaves = [name.split(".")[-1] for name in KNOWN]
    near = near or [k for k in KNOWN if k.split(".")[-1] in difflib.get_close_matches(last, [last, *leaves], 2)]
    hint = f"; did you mean '{near[0]}'?" if near else f"; sections are {', '.join(Config.model_fields)}"
    raise ConfigError(f"{where}: unknown setting '{key}'{hint}")


def _explain(error: ValidationError) -> str:
    names = {part for name in KNOWN for part in name.split(".")}
    lines = []
    for fault in error.errors():
        # Pydantic also names the family of a model, which is no part of a setting's name.
        parts = [str(part) for part in fault["loc"]]
        family = parts[:1] == ["model"] and parts[1:2] and parts[1] in FAMILIES
        where = ".".join(part for part in parts[:1] + parts[2 if family else 1 :] if part in names)
        if fault["type"] == "union_tag_invalid":
            where, fault["input"] = "model.architecture", fault["ctx"]["tag"]
            fault["msg"] = f"must be one of {', '.join(FAMILIES)}"
        given = "" if isinstance(fault["input"], dict | BaseModel) else f" (given {shown(fault['input'], 80)})"
        message = fault["msg"].removeprefix("Value error, ")
        choices = list(FAMILIES) if where == "model.architecture" else re.findall(r"'(\w+)'", message)
        text = fault["input"] if isinstance(fault["input"], str) else ""  # no is not all
        near = difflib.get_close_matches(text, choices, 1, 0.4)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        hint = "; write a list, such as [1, 2]" if fault["type"] == "tuple_type" else hint
        lines.append(f"{where}: {message}{given}{hint}" if given else message)
    return listed(dict.fromkeys(lines), 4, "; ")
