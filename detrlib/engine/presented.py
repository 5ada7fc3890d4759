"""What a finished run presents to Weights & Biases: boxes on images, maps beside their numbers, files.

Legend: H heads, n queries of an example, h x w cells of a map.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, PartialState

from detrlib import runs
from detrlib.boxes import xyxy_to_cxcywh
from detrlib.config import Config
from detrlib.engine.tracking import WandB
from detrlib.errors import RunError
from detrlib.metrics.localisation import paibb
from detrlib.metrics.sparsity import gini, zeros_ratio
from detrlib.runs import Example

log = logging.getLogger(__name__)

RESULTS = ("results.json", "config.yaml", "environment.json", "data.json", "predictions.json", "metrics.jsonl")
COLUMNS = ("image_id", "image", "query", "class", "score", "object", "map", "gini", "zeros", "paibb")
PRESENTED = 8  # images of those stored: each query of each is uploaded as two pictures
INK = np.array([213, 94, 0])  # of cells with weight, on pale grey
DECADES = 3  # of weights, from those with the faintest colour to those with the densest


def present(accelerator: Accelerator, cfg: Config, run_dir: Path) -> None:
    """Log examples, a table of attention maps, the last checkpoint and the results of a finished run to its W&B run.

    Where that fails the run is finished all the same, and a warning says why.
    """
    if not cfg.train.tracking.artifacts:
        return
    for tracker in accelerator.trackers:
        if isinstance(tracker, WandB):
            import wandb  # slow to import, and loaded already where there is a run

            try:
                _present(tracker.run, cfg, run_dir)
            except (OSError, RunError, wandb.Error) as error:
                log.warning("Weights & Biases: examples and files were not logged (%s)", error)


def _present(run, cfg: Config, run_dir: Path) -> None:
    """Whatever there is of it; run: of wandb."""
    import wandb

    results, names = runs.load_results(run_dir), runs.class_names(run_dir)
    examples = runs.load_examples(run_dir)[:PRESENTED] if cfg.evaluate.examples else []
    shown = {"global_step": results["global_step"]}
    if examples:
        shown["examples/detections"] = [boxes_on_image(example, names) for example in examples]
    if rows := [row for example in examples for row in rows_of(example, names)]:
        shown["examples/attention"] = wandb.Table(columns=list(COLUMNS), data=rows)
    run.log(shown)
    ap = {name: results["detection"][name] for name in ("AP", "AP50", "AP75")}
    model = wandb.Artifact(f"model-{run.id}", "model", metadata={"epoch": results["epoch"]} | ap)
    model.add_file(str(run_dir / "checkpoints" / "last.pt"), policy="immutable")  # no copy of hundreds of megabytes
    measured = wandb.Artifact(f"results-{run.id}", "results", metadata=ap)
    for name in RESULTS:
        if (run_dir / name).exists():
            measured.add_file(str(run_dir / name))
    run.log_artifact(model, aliases=["last"])
    run.log_artifact(measured)


def present_report(cfg: Config, home: Path, report: Path) -> None:
    """Log the report of a sweep in `home` and its folder of figures as an artifact, to a W&B run of the sweep itself.

    cfg: of its runs, which say whether there is W&B. Where it fails a warning says why.
    """
    settings = cfg.train.tracking
    if settings.wandb == "disabled" or not settings.artifacts:
        return
    import wandb

    try:
        PartialState(cpu=True)  # which trackers ask whether this is the main process
        tracker = WandB(cfg, home)
        tracker.init_kwargs |= {"config": {"runs": sorted(path.parent.name for path in home.glob("*/config.yaml"))}}
        tracker.start()
        artifact = wandb.Artifact(f"report-{tracker.run.id}", "report")
        artifact.add_file(str(report))
        if (home / "figures").is_dir():
            artifact.add_dir(str(home / "figures"), name="figures")
        tracker.run.log_artifact(artifact)
        tracker.finish()
    except (OSError, wandb.Error) as error:
        log.warning("Weights & Biases: the report was not logged (%s)", error)


def boxes_on_image(
    example: Example, names: Mapping[int, str], image: np.ndarray | None = None, only: int | None = None
):
    """A `wandb.Image` with predicted and annotated boxes, which can be switched on and off there.

    names: label -> class; image: [H,W,3], if not that of the example; only: the one query whose boxes are wanted.
    """
    import wandb

    queries = range(len(example.boxes)) if only is None else [only]
    objects = range(len(example.true_boxes)) if only is None else [example.matched[only]]
    predicted = [
        _box(example.boxes[n], example.labels[n], names) | {"scores": {"score": float(example.scores[n])}}
        for n in queries
    ]
    annotated = [_box(example.true_boxes[n], example.true_labels[n], names) for n in objects]
    groups = {"predictions": predicted, "annotations": annotated}
    boxes = {name: {"box_data": found, "class_labels": dict(names)} for name, found in groups.items()}
    return wandb.Image(example.image if image is None else image, boxes=boxes, caption=f"image {example.image_id}")


def _box(box: np.ndarray, label: int, names: Mapping[int, str]) -> dict:
    position = dict(zip(("minX", "minY", "maxX", "maxY"), map(float, box), strict=True))
    caption = names.get(int(label), str(label))
    return {"position": position, "domain": "pixel", "class_id": int(label), "box_caption": caption}


def rows_of(example: Example, names: Mapping[int, str]) -> list[list]:
    """COLUMNS of every matched query of an example: its map in the last layer, mean over heads, and numbers of that.

    None where no maps of cross-attention are stored.
    """
    matched = np.flatnonzero(example.matched >= 0)
    if "decoder_cross" not in example.sites or not len(matched):
        return []
    maps = example.maps("decoder_cross", -1).mean(0)[matched]  # [n,h,w]
    height, width = example.image.shape[:2]
    extent = np.minimum(example.extent_of(maps), maps.shape[-2:])  # rounding may have added to it
    weights = torch.from_numpy(np.ascontiguousarray(maps, dtype=np.float32))
    truth = torch.from_numpy(example.true_boxes[example.matched[matched]] / [width, height, width, height])
    inside = paibb(weights, xyxy_to_cxcywh(truth), tuple(map(float, extent))).tolist()
    flat = weights.flatten(-2)
    numbers = zip(gini(flat).tolist(), zeros_ratio(flat).tolist(), inside, strict=True)
    whole, rows = boxes_on_image(example, names), []
    for n, weight, measured in zip(matched, maps, numbers, strict=True):
        label, truth = (names.get(int(k), str(k)) for k in (example.labels[n], example.true_labels[example.matched[n]]))
        where = boxes_on_image(example, names, map_on_image(example.image, weight, extent), n)
        known = [int(example.queries[n]), label, float(example.scores[n]), truth]
        rows.append([int(example.image_id), whole, *known, where, *measured])
    return rows


def map_on_image(image: np.ndarray, weights: np.ndarray, extent: np.ndarray) -> np.ndarray:
    """A map [h,w] over `image` [H,W,3] in pale grey; the higher the weight the denser, and none where it is zero.

    extent: [2], height and width of the image in cells. Densities are logarithmic, up to the highest weight.
    """
    cells = [
        np.minimum((np.arange(side) + 0.5) * reach / side, count - 1).astype(int)
        for side, reach, count in zip(image.shape, extent, weights.shape, strict=False)
    ]
    here = weights[np.ix_(*cells)][..., None]  # [H,W,1]
    shares = 1 + np.log10(np.maximum(here, 1e-30) / max(float(weights.max()), 1e-30)) / DECADES
    density = np.where(here > 0, 0.2 + 0.7 * np.clip(shares, 0, 1), 0)
    grey = 0.5 * image.mean(-1, keepdims=True) + 127
    return ((1 - density) * grey + density * INK).astype(np.uint8)
