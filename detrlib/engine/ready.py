"""What can be known to be wrong before a training begins, all of it: in each of its processes, and before they start.

A fault that only processes met would cost the time that they take to start, and be told by each of them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from detrlib.config import Config, replace
from detrlib.data import CocoDataset, describe_data, look_over, open_splits
from detrlib.data.batch import EpochSampler, worker_processes
from detrlib.data.classes import class_list
from detrlib.engine.memory import require_memory
from detrlib.engine.start import initial_model, learns_from_crops, starting_model, wanted_classes
from detrlib.engine.state import require_compiler
from detrlib.errors import ConfigError
from detrlib.runs.opening import refuse_run


class Ready(NamedTuple):
    """What training can begin with."""

    cfg: Config  # with what follows from the data
    splits: Mapping[str, CocoDataset]  # train and val
    described: dict[str, Any]  # the data, as a run keeps it


def ready(cfg: Config, processes: int, device: torch.device | None) -> Ready:
    """Open the data, and complete the settings by them.

    Args:
        cfg: every setting.
        processes: that will train, all together.
        device: of this one; None: they will train on others, of which nothing is asked.

    Raises:
        ConfigError: settings fit neither the data, nor each other, nor the machine.
        DataError: the data are not in order, see `open_splits`.
    """
    if cfg.train.batch_size % processes:
        raise ConfigError(f"train.batch_size {cfg.train.batch_size} is not a multiple of the {processes} processes")
    if cfg.train.compile and device:
        require_compiler(device)
    splits = open_splits(cfg.data)
    train_set = splits["train"]
    EpochSampler(len(train_set), cfg.train.batch_size, 0, processes, cfg.train.seed)  # raises if images are too few
    for images in (cfg.train.batch_size // processes, cfg.evaluate.batch_size):
        worker_processes(cfg.data, images, processes)  # raises where shared memory has no room for them
    if cfg.model.architecture == "huggingface":  # from here on, all of its configuration stands in the run
        cfg = cfg.model_copy(update={"model": cfg.model.completed()})
    classes = {"model.num_classes": wanted_classes(cfg, train_set), "data.classes": class_list(train_set.names)}
    cfg = replace(cfg, classes)
    if device:
        require_memory(cfg, device, processes)
    if cfg.model.architecture == "huggingface":
        initial_model(cfg, "none").try_out()  # transformers itself compares few of its options
    return Ready(cfg, splits, describe_data(cfg.data, splits))


def ready_for_processes(cfg: Config, run_dir: Path, processes: int, gpus: bool) -> None:
    """Find every fault that processes of a training would meet before their first step; nothing is written.

    Raises as `ready`, `refuse_run`, `look_over` and `starting_model`.
    """
    cfg, splits, described = ready(cfg, processes, None if gpus else torch.device("cpu"))
    resumes = refuse_run(cfg, run_dir, described)
    look_over(splits, cfg.model.num_queries, cfg.data.check)  # what was decoded need not be again
    if not (resumes or learns_from_crops(cfg)):
        starting_model(cfg, splits["train"])
