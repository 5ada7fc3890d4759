"""What can be known to be wrong before a training begins, all of it: in each of its processes, and before they start.

A fault that only processes met would cost the time that they take to start, and be told by each of them.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from detrlib.config import Config, replace
from detrlib.data import CocoDataset, describe_data, look_over, open_splits
from detrlib.data.batch import EpochSampler, worker_processes
from detrlib.data.classes import class_list
from detrlib.engine.memory import all_memory, gib
from detrlib.engine.optimizer import freeze
from detrlib.engine.start import initial_model, learns_from_crops, starting_model, wanted_classes
from detrlib.engine.state import require_compiler
from detrlib.errors import ConfigError
from detrlib.models import build_model
from detrlib.runs.opening import refuse_run


class Ready(NamedTuple):
    """What training can begin with."""

    cfg: Config  # with what follows from the data
    splits: Mapping[str, CocoDataset]  # train and val
    described: dict[str, Any]  # the data, as a run keeps it


def ready(cfg: Config, processes: int, device: torch.device | None, here: int | None = None) -> Ready:
    """Open the data, and complete the settings by them.

    Args:
        cfg: every setting.
        processes: that will train, all together.
        device: of this one; None: they will train on others, of which nothing is asked.
        here: how many of the processes share the memory of this machine; None: as torchrun says, or all.

    Raises:
        ConfigError: settings fit neither the data, nor each other, nor the machine.
        DataError: the data are not in order, see `open_splits`.
    """
    if cfg.train.batch_size % processes:
        raise ConfigError(f"train.batch_size {cfg.train.batch_size} is not a multiple of the {processes} processes")
    if cfg.train.compile and device:
        require_compiler(device)
    here = here or int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    for images in (cfg.train.batch_size // processes, cfg.evaluate.batch_size):
        worker_processes(cfg.data, images, here)  # raises where shared memory has no room for them
    splits = open_splits(cfg.data)
    train_set = splits["train"]
    EpochSampler(len(train_set), cfg.train.batch_size, 0, processes, cfg.train.seed)  # raises if images are too few
    if cfg.model.architecture == "huggingface":  # from here on, all of its configuration stands in the run
        cfg = cfg.model_copy(update={"model": cfg.model.completed()})
    classes = {"model.num_classes": wanted_classes(cfg, train_set), "data.classes": class_list(train_set.names)}
    cfg = replace(cfg, classes)
    if device:
        _require_memory(cfg, device, here)
    if cfg.model.architecture == "huggingface":
        initial_model(cfg, "none").try_out()  # transformers itself compares few of its options
    return Ready(cfg, splits, describe_data(cfg.data, splits))


def ready_for_processes(cfg: Config, run_dir: Path, here: int, nodes: int, gpus: bool) -> None:
    """Find every fault that processes of a training would meet before their first step; nothing is written.

    here: processes on this machine, and on each of the nodes. gpus: whether they train on such.

    Raises as `ready`, `refuse_run`, `look_over` and `starting_model`.
    """
    cfg, splits, described = ready(cfg, here * nodes, None if gpus else torch.device("cpu"), here)
    resumes = refuse_run(cfg, run_dir, described)
    look_over(splits, cfg.model.num_queries, cfg.data.check)  # what was decoded need not be again
    if not (resumes or learns_from_crops(cfg)):
        starting_model(cfg, splits["train"])


def _require_memory(cfg: Config, device: torch.device, processes: int) -> None:
    """Raise ConfigError where not even weights, gradients and AdamW of a model fit the machine; none of it is made."""
    with torch.device("meta"):
        model = build_model(cfg.model, "none")
    freeze(model, cfg.train)
    needed = sum(parameter.nbytes * (4 if parameter.requires_grad else 1) for parameter in model.parameters())
    room = all_memory(device, processes)
    if needed > room:
        name, most = max(model.named_parameters(), key=lambda each: each[1].nbytes)
        ids = "" if cfg.data.contiguous else ", where ids of classes have gaps set data.contiguous: true"
        raise ConfigError(
            f"model: weights, gradients and AdamW take {gib(needed)}, and the machine has {gib(room)} for a process; "
            f"the largest is {name}, {' x '.join(map(str, most.shape))}; lower model.hidden_dim, feedforward_dim, "
            f"num_queries, layers or num_classes {cfg.model.num_classes}{ids}"
        )
