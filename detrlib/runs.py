"""The run folder: the contract between training and everything that reads its results.

    papermill_runs/<run_name>/
        config.yaml        every setting, resolved          environment.json   commit, versions, hardware
        metrics.jsonl      one line per logged step or epoch, flat "group/name" keys
        checkpoints/       last.pt (resume), best.pt and epoch-*.pt (weights)
        results.json       final numbers; its presence means: finished
        predictions.json   COCO-format detections           examples/*.npz     images with what was found in them
        maps/*.parquet     attention maps, see `store`
        measures/*.parquet of single images and objects: sparsity, localisation, matches that AP is computed from
        *.ipynb            executed notebooks

Files are written to a temporary neighbour and renamed, so a reader or a resumed run never meets half of one; lines of
metrics.jsonl are appended, and a last line cut short is ignored.
"""

import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from detrlib.config import PROJECT, Config, changed_settings, flat_settings, load_config, save_config
from detrlib.store import AttentionStore, RunError, StoredMaps

RUNS = PROJECT / "papermill_runs"
FREE_TO_CHANGE = ("data.workers", "data.cache", "train.log_every", "train.keep_every", "train.tracking", "evaluate")


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
class Detected:
    """One image as the model saw it, with what the model found.

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
    queries: np.ndarray  # [n] their numbers in the model, and in the attention store
    extent: np.ndarray  # [2] height and width of the image in cells of the map, <= (h, w)


@dataclass
class Example(Detected):
    """What a model found in one image, and where it looked for it: maps are read from disk when they are indexed."""

    maps: np.ndarray | StoredMaps  # [L,H,n,h,w] decoder cross-attention of every layer and head
    other_maps: dict[str, np.ndarray | StoredMaps] = field(default_factory=dict)  # by site, where they are stored

    def attention(self, site: str = "decoder_cross") -> np.ndarray | StoredMaps:
        """Maps of a site: decoder_cross [L,H,n,h,w], decoder_self [L,H,n,Q], encoder_self [L,H,h*w,h,w].

        The queries of encoder_self are the cells of the grid, row by row; of encoders with several levels, or that
        drop or pool tokens, all their tokens. Raises RunError for a site that is not stored.
        """
        if site == "decoder_cross":
            return self.maps
        if site not in self.other_maps:
            raise RunError(
                f"maps of {site} are not stored of image {self.image_id}, only of "
                f"{', '.join(['decoder_cross', *self.other_maps])}; add it to evaluate.store_sites and evaluate again"
            )
        return self.other_maps[site]


def save_example(run_dir: Path, found: Detected) -> None:
    """The picture and detections of one example as examples/<image id>.npz; its maps are for the attention store."""

    def write(path: Path) -> None:
        with path.open("wb") as file:
            np.savez_compressed(file, **asdict(found))

    write_atomic(run_dir / "examples" / f"{found.image_id:012d}.npz", write)


def load_examples(run_dir: Path) -> list[Example]:
    """The stored examples of a run, by image id; none where the model has no attention to show.

    Raises RunError when there should be some, or their maps are missing.
    """
    paths = sorted((run_dir / "examples").glob("*.npz"))
    if not paths and not _lacks_attention(run_dir):
        raise RunError(f"{run_dir} holds no examples; evaluate it first (notebook 06_evaluate)")
    store = AttentionStore(run_dir) if paths else None
    return [_load_example(path, store) for path in paths]


def _load_example(path: Path, store: AttentionStore) -> Example:
    with np.load(path) as file:
        values = {name: file[name] for name in file.files}
    if "queries" not in values:
        raise RunError(f"{path} was written before maps had a store of their own; evaluate the run again")
    image_id, queries = int(values.pop("image_id")), values["queries"]
    rows = {"decoder_cross": queries, "decoder_self": queries, "encoder_self": None}
    maps = {site: StoredMaps(store, image_id, site, rows[site]) for site in store.sites(image_id)}
    return Example(image_id, **values, maps=maps.pop("decoder_cross"), other_maps=maps)


def _lacks_attention(run_dir: Path) -> bool:
    """Whether a run is evaluated, and its model has no attention."""
    results = load_results(run_dir) if (run_dir / "results.json").exists() else {}
    return "detection" in results and "attention" not in results


def clear_examples(run_dir: Path) -> None:
    """Remove stored examples: those of an earlier evaluation may be of other images."""
    for path in (run_dir / "examples").glob("*.npz"):
        path.unlink()


def same_image(examples: dict[str, list[Example]], number: int | None = None) -> dict[str, Example]:
    """One image in every run: example `number` of the first run, or None for the one with most annotated objects.

    Runs without examples, whose models have no attention, are left out. Raises RunError naming the runs that did not
    store that image, or when no run is left.
    """
    examples = {run: stored for run, stored in examples.items() if stored}
    if not examples:
        raise RunError("no run has examples with attention maps; name one whose model has attention")
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


def save_tables(run_dir: Path, tables: Mapping[str, pd.DataFrame]) -> None:
    """Each table as measures/<name>.parquet, written atomically."""
    for name, table in tables.items():
        write_atomic(run_dir / "measures" / f"{name}.parquet", partial(table.to_parquet, index=False))


def load_table(run_dir: Path, name: str, made_by: str = "detrlib.evaluate") -> pd.DataFrame:
    """measures/<name>.parquet of a run. Raises RunError naming the file when there is none, or it is none, and the
    module that makes it.
    """
    path = run_dir / "measures" / f"{name}.parquet"
    if not path.exists():
        raise RunError(f"no {path}; measure the run (again): python -m {made_by} {run_dir}")
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are among these
        raise RunError(f"{path} is not readable ({error}); delete it, then: python -m {made_by} {run_dir}") from error
