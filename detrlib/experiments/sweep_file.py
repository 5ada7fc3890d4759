"""What a sweep file asks for: the settings of every run of it, and parameters of notebooks; see `sweep`."""

from pathlib import Path
from typing import Any, NamedTuple

from detrlib.config import Config, given_twice, load_config, project_path, read_yaml
from detrlib.engine.notebooks import checked_parameters, find_notebook
from detrlib.errors import ConfigError, RunError, shown
from detrlib.runs.folder import name_fault

SEEDS = "seeds"
# What stands beside the runs of a sweep.
BESIDE = ("figures", "report.html", "viewer.html", "log.txt", "notebooks.json", "slurm.json")


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
    if fault := _fault(values, path.stem):
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
        if not (isinstance(pair, list) and len(pair) == 2 and all(str(name) in values["runs"] for name in pair)):
            raise ConfigError(f"{path}: report: pairs: {pair!r} is not two of the runs, {', '.join(values['runs'])}")
    base, configs = path.parent / values["base"], {}
    for name, overrides in _repeated(values):
        try:
            configs[name] = load_config(base, {**shared, **overrides})
        except ConfigError as error:
            raise ConfigError(f"{path}: runs: {name}: {error}") from None
    return Sweep(configs, **parameters, folder=values.get("folder"))


def _seeds_fault(given: Any) -> str | None:
    """Why seeds are none, in words: a seed that is there twice would be trained twice at a time in one folder."""
    if given is None:
        return None
    if not (isinstance(given, list) and all(type(seed) is int and 0 <= seed < 2**31 for seed in given)):
        return f"{SEEDS} is {given!r}; expected a list of numbers from 0"
    return f"{SEEDS} is {given!r}: each may stand there once" if len(set(given)) < len(given) else None


def _name_fault(name: Any) -> str | None:
    """Why a run of a sweep cannot be called so, in words."""
    if not isinstance(name, str):
        return f"{name!r} is no text; write it in quotes"
    if set(name) & set("/\\") or name.startswith("."):
        return f"{name!r} is no folder inside that of the sweep"
    if name in BESIDE or name.endswith(".ipynb"):
        return f"{name!r} is what something else of the sweep is called"
    fault = name_fault(name)
    return fault and f"{shown(name)} names no run: {fault}"


def _repeated(values: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Name and overrides of every run and seed; seed by seed, so that every variant has a first result early."""
    wanted = {name: dict(overrides or {}) for name, overrides in values["runs"].items()}
    seeds = {name: overrides.pop(SEEDS, None) or values.get(SEEDS) or [] for name, overrides in wanted.items()}
    repeated = [(name, overrides) for name, overrides in wanted.items() if not seeds[name]]
    for seed in dict.fromkeys(seed for own in seeds.values() for seed in own):
        for name, overrides in wanted.items():
            if seed in seeds[name]:
                named = {k: v.replace("{seed}", str(seed)) if isinstance(v, str) else v for k, v in overrides.items()}
                repeated.append((f"{name}-seed{seed}", {**named, "train.seed": seed}))
    return repeated


def _fault(values: dict[str, Any], home: str) -> str | None:
    """What a sweep file must not be, in words; home: its name, of which a folder is made beside shared runs."""
    wanted = {"base": str, "runs": dict, "overrides": dict, "seeds": list, "measure": dict, "report": dict}
    wanted["folder"] = str
    if unknown := values.keys() - wanted.keys():
        return f"unknown {', '.join(sorted(map(str, unknown)))}"
    for name, kind in wanted.items():
        given = values.get(name)
        if not isinstance(given, kind) and (given is not None or name in ("base", "runs")):
            return f"{name} is {given!r}"
    for name, overrides in values["runs"].items():
        if fault := _name_fault(name):
            return f"runs: {fault}"
        if not isinstance(overrides, dict | None):
            return f"runs: {name!r} is {overrides!r}"
        if twice := given_twice(overrides or {}):
            return f"runs: {name}: {twice}"
        if fault := _seeds_fault((overrides or {}).get(SEEDS)):
            return f"runs: {name}: {fault}"
    if twice := given_twice(values.get("overrides") or {}):
        return f"overrides: {twice}"
    if fault := _seeds_fault(values.get(SEEDS)):
        return fault
    names = [name for name, _ in _repeated(values)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        return f"runs: two are called {twice}, one of them by its seed"
    if values.get("folder") and home in names:
        return f"runs: {home} is what the folder of the report is called, as the file is; give it another name"
    return None if names else "runs names none"
