"""What a sweep file asks for: the settings of every run of it, and parameters of notebooks; see `sweep`."""

from pathlib import Path
from typing import Any, NamedTuple

from detrlib.config import Config, load_config, project_path, read_yaml
from detrlib.engine.notebooks import checked_parameters, find_notebook
from detrlib.errors import ConfigError, RunError

SEEDS = "seeds"


class Sweep(NamedTuple):
    """What a sweep file asks for."""

    configs: dict[str, Config]  # by run name
    measure: dict[str, Any]  # parameters of notebook evaluate
    report: dict[str, Any]  # parameters of notebook thesis_figures
    folder: str | None  # where runs go that it has in common with other sweeps


def read_sweep(path: Path) -> Sweep:
    """A sweep file, everything in it checked. Raises ConfigError naming the file and the setting."""
    path = project_path(path)
    values = read_yaml(path)
    shared = values.get("overrides") or {}
    if fault := _fault(values):
        raise ConfigError(
            f"{path}: {fault}; a sweep has base (a config), runs (a name and overrides each), and optionally overrides "
            "for all, seeds such as [1, 2, 3], measure and report (parameters of notebooks evaluate and "
            "thesis_figures), and folder (of several sweeps, for their runs)"
        )
    parameters = {}
    for name, notebook in (("measure", "evaluate"), ("report", "thesis_figures")):
        try:
            given = values.get(name)
            parameters[name] = checked_parameters(find_notebook(notebook), given) if given else {}
        except RunError as error:
            raise ConfigError(f"{path}: {name}: {error}") from None
    for pair in parameters["report"].get("pairs", []):
        if not (isinstance(pair, list) and len(pair) == 2 and set(pair) <= values["runs"].keys()):
            raise ConfigError(f"{path}: report: pairs: {pair!r} is not two of the runs, {', '.join(values['runs'])}")
    base = path.parent / values["base"]
    configs = {name: load_config(base, {**shared, **overrides}) for name, overrides in _repeated(values).items()}
    return Sweep(configs, **parameters, folder=values.get("folder"))


def _are_seeds(given: Any) -> bool:
    return given is None or (isinstance(given, list) and all(type(seed) is int for seed in given))


def _repeated(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The overrides of every run and seed by name; seed by seed, so that every variant has a first result early."""
    wanted = {name: dict(overrides or {}) for name, overrides in values["runs"].items()}
    seeds = {name: overrides.pop(SEEDS, None) or values.get(SEEDS) or [] for name, overrides in wanted.items()}
    repeated = {name: overrides for name, overrides in wanted.items() if not seeds[name]}
    for seed in dict.fromkeys(seed for own in seeds.values() for seed in own):
        for name, overrides in wanted.items():
            if seed in seeds[name]:
                named = {k: v.replace("{seed}", str(seed)) if isinstance(v, str) else v for k, v in overrides.items()}
                repeated[f"{name}-seed{seed}"] = {**named, "train.seed": seed}
    return repeated


def _fault(values: dict[str, Any]) -> str | None:
    """What a sweep file must not be, in words."""
    wanted = {"base": str, "runs": dict, "overrides": dict, "seeds": list, "measure": dict, "report": dict}
    wanted["folder"] = str
    if unknown := values.keys() - wanted.keys():
        return f"unknown {', '.join(sorted(map(str, unknown)))}"
    for name, kind in wanted.items():
        given = values.get(name)
        if not isinstance(given, kind) and (given is not None or name in ("base", "runs")):
            return f"{name} is {given!r}"
    for name, overrides in values["runs"].items():
        if not isinstance(name, str) or not isinstance(overrides, dict | None):
            return f"runs: {name!r} is {overrides!r}"
        if not _are_seeds(own := (overrides or {}).get(SEEDS)):
            return f"runs: {name}: {SEEDS} is {own!r}"
    if not _are_seeds(values.get(SEEDS)):
        return f"{SEEDS} is {values[SEEDS]!r}"
    return None if values["runs"] else "runs names none"
