"""The run folder: the contract between training and everything that reads its results.

    papermill_runs/<run_name>/
        config.yaml        every setting, resolved          environment.json   commit, versions, hardware
        metrics.jsonl      one line per logged step or epoch, flat "group/name" keys
        checkpoints/       last.pt (resume), best.pt and epoch-*.pt (weights)
        results.json       final numbers; its presence means: finished
        predictions.json   COCO-format detections           examples/*.npz     images with their attention maps
        measures/          matches.parquet, annotations.parquet: what AP of any images is computed from
        *.ipynb            executed notebooks

Files are written to a temporary neighbour and renamed, so a reader or a resumed run never meets half of one; lines of
metrics.jsonl are appended, and a last line cut short is ignored.
"""

import json
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from detrlib.config import PROJECT, Config, changed_settings, flat_settings, load_config, save_config

RUNS = PROJECT / "papermill_runs"
FREE_TO_CHANGE = ("data.workers", "data.cache", "train.log_every", "train.keep_every", "train.tracking", "evaluate")


class RunError(RuntimeError):
    """A run folder cannot be used as asked; the message says what to do."""


def run_path(name: str | Path) -> Path:
    """The folder of a run: a bare or nested name lies under papermill_runs/, an absolute path is itself."""
    return PROJECT / name if Path(name).parts[:1] == (RUNS.name,) else RUNS / name


def open_run(cfg: Config, run_dir: Path) -> bool:
    """Make `run_dir` ready for training with `cfg`; True if it holds an unfinished run to resume.

    Raises RunError if the run is finished, or was begun with other settings.
    """
    if (run_dir / "results.json").exists():
        raise RunError(f"{run_dir} is finished and is not overwritten; choose another run name, or delete the folder")
    begun = (run_dir / "config.yaml").exists()
    checkpoint = (run_dir / "checkpoints" / "last.pt").exists()
    if begun and checkpoint:  # before the first checkpoint, other settings lose nothing
        refuse_other_settings(cfg, run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomic(run_dir / "config.yaml", lambda path: save_config(cfg, path))
    write_json(run_dir / "environment.json", environment())
    return begun or checkpoint


def refuse_other_settings(new: Config, run_dir: Path) -> None:
    """Raise RunError if the run in `run_dir` was begun with settings that give other results than `new`."""
    old = load_config(run_dir / "config.yaml")
    before = flat_settings(old)
    # What training fills in from the data is no contradiction to a config that leaves it open.
    changed = [
        f"{key} was {before[key]}, now {value}"
        for key, value in changed_settings(new, old).items()
        if not key.startswith(FREE_TO_CHANGE) and not (key == "model.num_classes" and None in (value, before[key]))
    ]
    if changed:
        raise RunError(
            f"{run_dir} was begun with other settings ({'; '.join(changed[:5])}); choose another run name, "
            "delete the folder, or go back to its settings to resume"
        )


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary neighbour of `path`, then put it in place; on failure `path` stays as it was.

    Raises RunError naming the file when the disk is full or not writable.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)  # mkstemp makes files for the owner alone; results are there to be shared
        os.replace(temporary, path)
    # torch.save turns a full disk into a RuntimeError of its own.
    except (OSError, RuntimeError) as error:
        raise RunError(f"could not write {path}: {error}. What was there before is intact; free some space.") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, values: Any) -> None:
    """`values` as indented JSON, written atomically."""
    write_atomic(path, lambda temporary: temporary.write_text(json.dumps(values, indent=1) + "\n"))


def save_checkpoint(path: Path, state: dict) -> None:
    """`state` as torch saves it, written atomically."""
    write_atomic(path, lambda temporary: torch.save(state, temporary))


def load_checkpoint(path: Path) -> dict:
    """A checkpoint on the CPU; no code in the file is run. Raises RunError naming the file."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RunError(f"no checkpoint {path}; has the run finished its first epoch?") from None
    except Exception as error:
        raise RunError(f"{path} is not a checkpoint of this project: {error}") from error


def weight_faults(own: dict, given: dict) -> list[str]:
    """In words, every way in which the names and shapes of two state dicts differ."""
    faults = [f"missing {name}" for name in own if name not in given]
    faults += [f"unexpected {name}" for name in given if name not in own]
    faults += [
        f"{name} is {tuple(given[name].shape)}, the model has {tuple(own[name].shape)}"
        for name in own
        if name in given and own[name].shape != given[name].shape
    ]
    return faults


def load_weights(model: torch.nn.Module, state: dict, source: Path) -> None:
    """Copy weights into `model`. Raises RunError naming the first differences if they are of another architecture."""
    faults = weight_faults(model.state_dict(), state)
    if faults:
        listed = "; ".join(faults[:4]) + (f"; and {len(faults) - 4} more" if len(faults) > 4 else "")
        raise RunError(f"{source} holds weights of another architecture: {listed}")
    model.load_state_dict(state)


def append_metrics(run_dir: Path, record: dict[str, float | int | None]) -> None:
    """Add one line to metrics.jsonl; a number that is not finite becomes null."""
    clean = {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in record.items()}
    path = run_dir / "metrics.jsonl"
    try:
        with path.open("a") as file:
            file.write(json.dumps(clean) + "\n")
    except OSError as error:
        raise RunError(f"could not write {path}: {error}; free some space, the same run name continues") from error


def read_metrics(run_dir: Path) -> list[dict]:
    """The records of metrics.jsonl; a last line cut short by a crash is left out."""
    path = run_dir / "metrics.jsonl"
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def truncate_metrics(run_dir: Path, last_step: int) -> None:
    """Forget what was logged after the checkpoint that a run resumes from."""
    kept = [record for record in read_metrics(run_dir) if record["global_step"] <= last_step]
    lines = "".join(json.dumps(record) + "\n" for record in kept)
    write_atomic(run_dir / "metrics.jsonl", lambda path: path.write_text(lines))


def environment() -> dict[str, Any]:
    """Commit, versions and hardware, so that a number can be traced to what made it."""
    packages = ("torch", "torchvision", "accelerate", "numpy", "faster-coco-eval")
    cuda = torch.cuda.is_available()
    return {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
    }


def _git(*arguments: str) -> str | None:
    """Output of a git command in the project, or None outside a checkout."""
    try:
        done = subprocess.run(["git", *arguments], cwd=PROJECT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@dataclass
class Example:
    """One image as the model saw it, with what the model found and where it looked.

    Boxes are xyxy in pixels of `image`; n confident or matched queries, best first.
    """

    image_id: int
    image: np.ndarray  # [H,W,3] uint8
    true_boxes: np.ndarray  # [T,4]
    true_labels: np.ndarray  # [T]
    boxes: np.ndarray  # [n,4]
    labels: np.ndarray  # [n]
    scores: np.ndarray  # [n]
    matched: np.ndarray  # [n] index of the true box the query was matched to, or -1
    maps: np.ndarray  # [L,H,n,h,w] decoder cross-attention of every layer and head, float16
    extent: np.ndarray  # [2] height and width of the image in cells of the map, <= (h, w)


def save_example(run_dir: Path, example: Example) -> None:
    """One example as examples/<image id>.npz."""

    def write(path: Path) -> None:
        with path.open("wb") as file:
            np.savez_compressed(file, **asdict(example))

    write_atomic(run_dir / "examples" / f"{example.image_id:012d}.npz", write)


def load_examples(run_dir: Path) -> list[Example]:
    """The stored examples of a run, by image id. Raises RunError when there are none."""
    paths = sorted((run_dir / "examples").glob("*.npz"))
    if not paths:
        raise RunError(f"{run_dir} holds no examples; evaluate it first (notebook 06_evaluate)")
    examples = []
    for path in paths:
        with np.load(path) as file:
            values = {name: file[name] for name in file.files}
        examples.append(Example(**values | {"image_id": int(values["image_id"])}))
    return examples


def clear_examples(run_dir: Path) -> None:
    """Remove stored examples: those of an earlier evaluation may be of other images."""
    for path in (run_dir / "examples").glob("*.npz"):
        path.unlink()


def same_image(examples: dict[str, list[Example]], number: int | None = None) -> dict[str, Example]:
    """One image in every run: example `number` of the first run, or None for the one with most annotated objects.

    Raises RunError naming the runs that did not store that image.
    """
    first = next(iter(examples.values()))
    number = int(np.argmax([len(example.true_boxes) for example in first])) if number is None else number
    wanted = first[number].image_id
    chosen = {run: next((e for e in stored if e.image_id == wanted), None) for run, stored in examples.items()}
    missing = [run for run, example in chosen.items() if example is None]
    if missing:
        raise RunError(f"image {wanted} is no stored example of {', '.join(missing)}; evaluate all runs alike")
    return chosen


def load_results(run_dir: Path) -> dict:
    """results.json of a finished run. Raises RunError when it is not finished."""
    path = run_dir / "results.json"
    if not path.exists():
        raise RunError(f"{run_dir} has no results.json: not a run, or not finished; start it again to continue")
    return json.loads(path.read_text())


def run_labels(run_dirs: Iterable[Path]) -> dict[Path, str]:
    """A short name for each run: its folder's, with those above it where that is not enough to tell runs apart."""
    run_dirs = list(run_dirs)
    depth = 1
    while len({run_dir.parts[-depth:] for run_dir in run_dirs}) < len(set(run_dirs)):
        depth += 1
    return {run_dir: "/".join(run_dir.parts[-depth:]) for run_dir in run_dirs}


def metrics_frame(run_dirs: Iterable[Path]) -> pd.DataFrame:
    """All logged metrics, tidy: columns run, global_step, epoch, metric, value; one row per number."""
    rows = []
    for run_dir, label in run_labels(run_dirs).items():
        for record in read_metrics(run_dir):
            where = {"run": label, "global_step": record["global_step"], "epoch": record["epoch"]}
            numbers = {k: v for k, v in record.items() if k not in ("global_step", "epoch") and v is not None}
            rows += [where | {"metric": name, "value": value} for name, value in numbers.items()]
    return pd.DataFrame(rows, columns=["run", "global_step", "epoch", "metric", "value"])


def alpha_frame(run_dirs: Iterable[Path]) -> pd.DataFrame:
    """Learnable alphas over training: columns run, epoch, site, layer, head, value; empty if there are none.

    One value per epoch, that at its end; epoch 0 is the first one logged.
    """
    frame = metrics_frame(run_dirs)
    alpha = frame[frame.metric.str.startswith("alpha/")]
    parts = alpha.metric.str.extract(r"alpha/(?P<site>\w+)\.layer_(?P<layer>\d+)-head_(?P<head>\d+)")
    parts = parts.astype({"layer": int, "head": int})
    tidy = pd.concat([alpha[["run", "epoch", "value"]], parts], axis=1)
    # A record of an epoch comes before those of the steps after it, which carry the same number.
    return tidy.drop_duplicates(["run", "epoch", "site", "layer", "head"]).reset_index(drop=True)


def attention_frame(run_dirs: Iterable[Path], site: str) -> pd.DataFrame:
    """Sparsity of one site, tidy: columns run, metric, layer (from 0), value."""
    rows = [
        {"run": label, "metric": metric, "layer": layer, "value": value}
        for run_dir, label in run_labels(run_dirs).items()
        for metric, values in load_results(run_dir)["attention"].get(site, {}).items()
        for layer, value in enumerate(values)
    ]
    return pd.DataFrame(rows, columns=["run", "metric", "layer", "value"])


def group_of(label: str) -> str:
    """The name that runs of several seeds share: `label` without "-seed3" or "_seed3" at the end of a folder's name."""
    return re.sub(r"[-_]seed\d+(?=/|$)", "", label)


def results_frame(run_dirs: Iterable[Path]) -> pd.DataFrame:
    """All headline numbers, one row per run: run, group, seed, architecture, the transform at each site, the twelve of
    COCO, `<site>/<measure>` (means over layers), PAIBB by size, images, epoch, seconds; missing where a run has none.
    """
    rows = []
    for run_dir, label in run_labels(run_dirs).items():
        results, cfg = load_results(run_dir), load_config(run_dir / "config.yaml")
        transforms = {
            site: getattr(cfg.model.attention, site) for site in ("encoder_self", "decoder_self", "decoder_cross")
        }
        row = {"run": label, "group": group_of(label), "seed": cfg.train.seed, "architecture": cfg.model.architecture}
        row |= transforms | {name: value for name, value in results["detection"].items() if name != "per_class"}
        for site, measures in results.get("attention", {}).items():
            row |= {f"{site}/{name}": float(np.mean(values)) for name, values in measures.items()}
        row |= {f"paibb/{size}": value for size, value in results.get("paibb", {}).items()}
        rows.append(row | {name: results.get(name) for name in ("images", "epoch", "seconds")})
    return pd.DataFrame(rows)


def save_tables(run_dir: Path, tables: Mapping[str, pd.DataFrame]) -> None:
    """Each table as measures/<name>.parquet, written atomically."""
    for name, table in tables.items():
        write_atomic(run_dir / "measures" / f"{name}.parquet", partial(table.to_parquet, index=False))


def load_table(run_dir: Path, name: str) -> pd.DataFrame:
    """measures/<name>.parquet of a run. Raises RunError naming the file when there is none, or it is none."""
    path = run_dir / "measures" / f"{name}.parquet"
    if not path.exists():
        raise RunError(f"no {path}; evaluate the run again: python -m detrlib.evaluate {run_dir}")
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are among these
        raise RunError(f"{path} is not readable ({error}); evaluate the run again") from error


def results_table(run_dirs: Iterable[Path]) -> pd.DataFrame:
    """The main table, one row per run: AP in six cuts, Gini and zeros of decoder cross-attention, PAIBB."""
    rows = {}
    for run_dir, label in run_labels(run_dirs).items():
        results = load_results(run_dir)
        cross = results["attention"]["decoder_cross"]
        rows[label] = {
            **{name: results["detection"][name] for name in _AP},
            "Gini": float(np.mean(cross["gini"])),
            "zeros": float(np.mean(cross["zeros"])),
            "PAIBB": results["paibb"]["all"],
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("run")


def paibb_table(run_dirs: Iterable[Path]) -> pd.DataFrame:
    """PAIBB by object size, one row per run; `pairs` is how many matched objects it is a mean over."""
    rows = {label: load_results(run_dir)["paibb"] for run_dir, label in run_labels(run_dirs).items()}
    order = ["all", "small", "medium", "large", "pairs"]
    return pd.DataFrame.from_dict(rows, orient="index")[order].rename_axis("run")


def final_alphas(run_dirs: Iterable[Path], site: str = "decoder_cross") -> dict[str, np.ndarray]:
    """Alphas [layers, heads] at the end of training, for the runs that have learnable ones at `site`."""
    found = {}
    for run_dir, label in run_labels(run_dirs).items():
        layers = {place: value for place, value in load_results(run_dir)["alpha"].items() if place.startswith(site)}
        if layers:
            found[label] = np.array([layers[f"{site}.{number}"] for number in range(len(layers))])
    return found


def provenance(run_dirs: Iterable[Path], made_by: str) -> str:
    """Where a figure comes from: what made it, and of each run the commit, the device and the resolved config."""
    lines = [f"made by {made_by}"]
    for run_dir, label in run_labels(run_dirs).items():
        known = json.loads((run_dir / "environment.json").read_text())
        changed = " with uncommitted changes" if known["uncommitted_changes"] else ""
        device = ", ".join(known["gpus"]) or f"CPU, {known['threads']} threads"
        lines.append(f"{label}: commit {known['commit']}{changed}; torch {known['packages']['torch']}; {device}")
    return "\n".join(lines)


_AP = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
