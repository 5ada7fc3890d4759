"""What a run tells the outside: messages, and metrics to services such as Weights & Biases, through Accelerate."""

import logging
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, WandBTracker, get_available_trackers, on_main_process
from torch import Tensor, nn
from tqdm import std
from tqdm.auto import tqdm

from detrlib.config import PROJECT, Config, flat_settings
from detrlib.errors import ConfigError, is_main_process
from detrlib.models import alpha_modules, transform_modules

log = logging.getLogger(__name__)

TRACKING = "tracking"  # folder in a run for the files of services
PROGRESS = "DETRLIB_PROGRESS"  # in the environment of processes whose launcher has a terminal, to which it passes bars
EVERY = 60  # seconds between lines, where there is no terminal for a bar
LINE = "{desc}: {n_fmt} of {total_fmt} after {elapsed}, about {remaining} left\n"
MAIN = ("loss", "loss_class", "loss_bbox", "loss_giou", "class_error", "cardinality_error")


def progress(items: Iterable | None, what: str, shown: bool = True, lines: bool = True, **options: Any) -> std.tqdm:
    """A bar over items, in the main process, on a terminal: its own, or that of the launcher, which passes it on.

    lines: where there is none, say every minute how far it is. options: others of tqdm.
    """
    shown = shown and is_main_process()
    bar = tqdm(
        items, desc=what, leave=False, disable=not shown or (False if PROGRESS in os.environ else None), **options
    )
    if shown and lines and bar.disable:
        options |= {"delay": EVERY, "mininterval": EVERY, "maxinterval": EVERY, "bar_format": LINE, "position": 0}
        return std.tqdm(items, desc=what, leave=False, **options)
    return bar


def say(accelerator: Accelerator, *lines: object) -> None:
    """Print lines at once, in the main process; `print` of the accelerator alone would in one of each node.

    Where nobody reads them any more, as after a terminal was closed, training goes on, or saves, all the same.
    """
    with suppress(OSError):
        for line in lines if accelerator.is_main_process else ():
            accelerator.print(line, flush=True)


def trackers(cfg: Config, run_dir: Path) -> list[GeneralTracker | str] | None:
    """What `Accelerator(log_with=...)` takes for `train.tracking`. Raises ConfigError where a package is missing."""
    settings = cfg.train.tracking
    installed = [str(name) for name in get_available_trackers()]
    if missing := [name for name in settings.also if name not in installed]:
        raise ConfigError(f"train.tracking.also: {missing[0]} is not installed; pip install it, or leave it out")
    chosen = [] if settings.wandb == "disabled" else [WandB(cfg, run_dir)]
    return [*chosen, *settings.also] or None


def duration(seconds: float) -> str:
    """In words: 48 s, 20 min, 3 h 5 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def start_tracking(accelerator: Accelerator, cfg: Config) -> None:
    """Let every service of the accelerator begin a run of `train.tracking.project` with the settings of `cfg`."""
    settings = {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in flat_settings(cfg).items()
    }
    accelerator.init_trackers(cfg.train.tracking.project, settings)


def wandb_id(name: str) -> str:
    """A name for a run that W&B takes as its id; names that differ have ids that do.

    It has 64 characters at most, and none of those that W&B or an address of a page give a meaning to.
    """
    plain = name.replace("/", "-")
    kept = re.sub(r"[^A-Za-z0-9_.-]", "-", plain)
    return kept if kept == plain and len(kept) <= 64 else f"{kept[:55]}-{sha256(name.encode()).hexdigest()[:8]}"


class WandB(WandBTracker):
    """A W&B run in `run_dir`, the same one whenever the run goes on.

    A service that cannot be reached turns it into an offline one (`wandb sync` uploads it later).
    """

    def __init__(self, cfg: Config, run_dir: Path):
        # Runs of two sweeps may have the same last name.
        runs = PROJECT / "papermill_runs"
        name = str(run_dir.relative_to(runs)) if run_dir.is_relative_to(runs) else run_dir.name
        settings = cfg.train.tracking
        super().__init__(
            settings.project,
            mode=settings.wandb,
            group=settings.group,
            name=name,
            id=wandb_id(name),
            resume="allow",
            dir=run_dir,
            config=cfg.model_dump(mode="json"),
        )

    @on_main_process
    def start(self) -> None:
        """Begin the run, or go on with it."""
        import wandb  # slow to import, and needed by few

        try:
            super().start()
        except wandb.Error as error:
            log.warning("Weights & Biases cannot be reached (%s); continuing offline", error)
            wandb.teardown()  # otherwise the name counts as in use
            self.init_kwargs["mode"] = "offline"
            super().start()
        # A resumed run repeats steps since its checkpoint; an axis of our own may go back, W&B's may not.
        self.run.define_metric("*", step_metric="global_step")

    def store_init_configuration(self, values: dict) -> None:
        """Nothing: the settings were given, in sections, when the run began."""

    @on_main_process
    def log(self, values: dict[str, float], step: int | None = None) -> None:
        """Log values on the axis of our own."""
        super().log(values | {"global_step": step})


def panels(record: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    """A record of metrics.jsonl under the names of the panels in which services show it.

    Main losses come weighted, as the optimiser sees them: with "train-main-metrics/loss_bbox" goes
    "train-metrics/loss_bbox", unweighted beside those of auxiliary layers. So too for the means of an epoch.
    """
    shown = {}
    for name, value in record.items():
        group, _, leaf = name.partition("/")
        if prefix := {"train": "train", "epoch": "train-epoch"}.get(group):
            if leaf in MAIN:
                shown[f"{prefix}-main-metrics/{leaf}"] = weights.get(leaf, 1.0) * value
            if leaf not in MAIN or leaf in weights:
                shown[f"{prefix}-metrics/{leaf}"] = value
        else:
            panel = {"extra": "train-extra-metrics", "val": "val-epoch-metrics", "detection": "val-AP"}.get(group)
            shown[f"{panel}/{leaf}" if panel else name] = value
    return shown


def learned_by_head(model: nn.Module) -> dict[str, float]:
    """For the log: learnable alphas per head, and all that transforms learn by head, such as scores of null keys."""
    values = {}
    for layer, module in alpha_modules(model).items():
        values |= _by_head("alpha", layer, module.alpha)
    for layer, module in transform_modules(model).items():
        for name, parameter in module.named_parameters():
            values |= _by_head(name, layer, parameter)
    return values


def alpha_gradients(model: nn.Module) -> dict[str, float]:
    """For the log: gradients of pre_alpha per head, and their norm per layer."""
    values = {}
    for layer, module in alpha_modules(model).items():
        gradient = module.pre_alpha.grad
        if gradient is None:  # alpha is held fixed
            continue
        values |= _by_head("pre_alpha_gradient", layer, gradient)
        site, number = layer.split(".")
        values[f"pre_alpha_gradient_norm/{site}.layer_{number}"] = gradient.norm().item()
    return values


class GradientNorms:
    """Norms of the gradients of a model, by layer and by group of the optimiser, from one pass over all of them.

    groups: of the optimiser, which say what is trained.
    """

    def __init__(self, model: nn.Module, groups: Iterable[Mapping[str, Any]]):
        group_of = {id(parameter): group["name"] for group in groups for parameter in group["params"]}
        trained = {name: each for name, each in model.named_parameters() if id(each) in group_of}
        self.parameters, members = list(trained.values()), {}
        for number, (name, parameter) in enumerate(trained.items()):
            for entry in (f"gradient_norm/{layer_of(name)}", f"gradient_norm_group/{group_of[id(parameter)]}"):
                members.setdefault(entry, []).append(number)
        device = next(model.parameters()).device
        self.members = {entry: torch.tensor(numbers, device=device) for entry, numbers in members.items()}

    def measure(self) -> Tensor:
        """Norms in the order of `members`, on the device of the model; nobody waits for them."""
        gradients = [torch.zeros((), device=p.device) if p.grad is None else p.grad for p in self.parameters]
        squares = torch.stack(torch._foreach_norm(gradients)).square()
        return torch.stack([squares[numbers].sum() for numbers in self.members.values()]).sqrt()


def layer_of(name: str) -> str:
    """The layer of a parameter: decoder.layer_0, backbone.layer_4, heads, ...; "other" where it has none of its own."""
    if found := re.search(r"(encoder|decoder)\.(?:layers\.)?(\d+)\.|(backbone)\..*?layers?\.?(\d+)\.", name):
        part, number = (each for each in found.groups() if each)
        return f"{part}.layer_{number}"
    if re.search(r"(class|bbox)_\w+", name):
        return "heads"
    return next((part for part in ("backbone", "encoder", "decoder") if f"{part}." in name), "other")


def _by_head(what: str, layer: str, values: Tensor) -> dict[str, float]:
    """Names for the log: ("alpha", "decoder_cross.0", [H]) -> {"alpha/decoder_cross.layer_0-head_0": ...}."""
    site, number = layer.split(".")
    return {f"{what}/{site}.layer_{number}-head_{head}": value for head, value in enumerate(values.tolist())}
