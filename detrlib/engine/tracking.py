"""What a run tells the outside: messages, and metrics to Weights & Biases when asked for."""

import logging
from pathlib import Path

from detrlib.config import PROJECT, Config

log = logging.getLogger(__name__)

MAIN = ("loss", "loss_class", "loss_bbox", "loss_giou", "class_error", "cardinality_error")


def show_messages() -> None:
    """Let the library's messages (data drawn, boxes dropped, backbone pretrained) appear on a command line."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("detrlib").setLevel(logging.INFO)


class Tracker:
    """Sends metrics to a W&B run in `run_dir`; does nothing when disabled.

    A service that cannot be reached turns the run into an offline one (`wandb sync` uploads it later).
    """

    def __init__(self, cfg: Config, run_dir: Path, enabled: bool = True):
        settings = cfg.train.tracking
        self.run = None
        if settings.wandb == "disabled" or not enabled:
            return
        import wandb  # slow to import, and needed by few

        # Runs of two sweeps may have the same last name.
        runs = PROJECT / "papermill_runs"
        name = str(run_dir.relative_to(runs)) if run_dir.is_relative_to(runs) else run_dir.name
        arguments = {
            "project": settings.project,
            "group": settings.group,
            "name": name,
            "id": name.replace("/", "-"),
            "resume": "allow",
            "dir": run_dir,
            "config": cfg.model_dump(mode="json"),
        }
        try:
            self.run = wandb.init(mode=settings.wandb, **arguments)
        except wandb.Error as error:
            log.warning("Weights & Biases cannot be reached (%s); continuing offline in %s", error, run_dir)
            wandb.teardown()  # otherwise the name counts as in use
            self.run = wandb.init(mode="offline", **arguments)
        # A resumed run repeats steps since its checkpoint; an axis of our own may go back, W&B's may not.
        self.run.define_metric("*", step_metric="global_step")

    def log(self, values: dict[str, float]) -> None:
        """Log flat "group/name" values; `global_step` among them is the axis."""
        if self.run is not None:
            self.run.log({_grouped(name): value for name, value in values.items()})

    def finish(self) -> None:
        if self.run is not None:
            self.run.finish()


def _grouped(name: str) -> str:
    """The W&B panel of a metric: the main losses apart from the many auxiliary ones."""
    group, _, leaf = name.partition("/")
    if group == "train":
        return f"train-main-metrics/{leaf}" if leaf in MAIN else f"train-metrics/{leaf}"
    groups = {
        "extra": "train-extra-metrics",
        "epoch": "train-epoch-main-metrics",
        "val": "val-epoch-metrics",
        "detection": "val-AP",
    }
    return f"{groups[group]}/{leaf}" if group in groups else name
