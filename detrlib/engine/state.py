"""What changes in training, and what a checkpoint holds of it."""

import copy
import math
import warnings
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from detrlib.config import Config
from detrlib.data import Batch
from detrlib.engine.epoch import EpochSoFar
from detrlib.engine.optimizer import build_optimizer, lr_factors
from detrlib.errors import ConfigError, DamagedFile
from detrlib.files import load_checkpoint, load_weights, write_checkpoint
from detrlib.models import set_alphas
from detrlib.runs.folder import run_name, to_measure
from detrlib.runs.trained import read_trained, write_trained


def require_compiler(device: torch.device) -> None:
    """Raises ConfigError where torch.compile does not work, for want of a C++ compiler on a CPU."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
    except Exception as error:  # of whatever it stumbled over
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"train.compile: torch.compile does not work here ({reason}); install a C++ compiler such as g++, or leave "
            "it out"
        ) from None


class TrainingState:
    """A model, its moving average if there is one, its optimiser, and how far they have come."""

    def __init__(self, model: nn.Module, cfg: Config, steps_per_epoch: int, accelerator: Accelerator):
        self.accelerator, self.steps_per_epoch, self.annealed = accelerator, steps_per_epoch, cfg.model.annealed_alphas
        optimizer = build_optimizer(model, cfg.train)
        factors = lr_factors(optimizer, steps_per_epoch, cfg.train)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        # Of kernels of 1 x 1, whose memory is the same in either layout.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.average, self.averaged_steps = copy.deepcopy(self.trained) if cfg.train.ema else None, 0
        self.move_average = get_ema_multi_avg_fn(cfg.train.ema)
        self.epoch, self.global_step, self.best = 0, 0, -math.inf
        self.midway: dict | None = None  # `EpochSoFar.state_dict` of an epoch that was not over when it was saved
        self.last_is_whole = True  # so that it is worth keeping beside the next one
        self._anneal()

    @property
    def trained(self) -> nn.Module:
        """The model without what `accelerator.prepare` wraps it in."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def evaluated(self) -> nn.Module:
        """The model that is evaluated: the average of its weights where there is one."""
        return self.trained if self.average is None else self.average

    @property
    def learning_rates(self) -> dict[str, float]:
        """By name of the optimiser's group."""
        return {group["name"]: group["lr"] for group in self.optimizer.param_groups}

    @property
    def position(self) -> dict:
        """Where training is, in numbers."""
        return {"epoch": self.epoch, "global_step": self.global_step, "learning_rates": self.learning_rates}

    @property
    def alphas(self) -> dict[str, float]:
        """Of the sites that are annealed; they follow from the step alone."""
        return self.annealed(self.global_step / max(1, self.steps_per_epoch))

    def _anneal(self) -> None:
        if alphas := self.alphas:
            set_alphas(self.trained, alphas)
            set_alphas(self.evaluated, alphas)

    def compile(self) -> None:
        """From now on let torch.compile run what is trained and evaluated; names of weights stay as they are.

        The first graph holds for batches of one size, and once another comes, the next for any.
        """
        for model in {self.trained, self.evaluated}:
            model.compile()

    def advance(self) -> None:
        """After an update of the weights: what moves along with them."""
        self.schedule.step()
        if self.average is not None:
            self._average()
        self.global_step += 1
        self._anneal()

    @torch.no_grad()
    def _average(self) -> None:
        """Move the average towards the weights; it begins at the first that were trained. Buffers are theirs.

        (`AveragedModel` of torch keeps its count in a tensor, for which a GPU is waited for at every step.)
        """
        own, weights = list(self.average.parameters()), list(self.trained.parameters())
        if buffers := list(self.average.buffers()):  # hundreds of frozen statistics
            torch._foreach_copy_(buffers, list(self.trained.buffers()))
        if self.averaged_steps:
            self.move_average(own, weights, self.averaged_steps)
        else:
            torch._foreach_copy_(own, weights)
        self.averaged_steps += 1

    def state_dict(self) -> dict:
        """All of it, as last.pt holds it."""
        return {
            "model": self.trained.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "averaged_steps": self.averaged_steps,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.last_epoch,
            "epoch": self.epoch,
            "global_step": self.global_step,
            "best": self.best,
        }

    def save(self, folder: Path, ap: float, keep_every: int = 0) -> None:
        """Write the checkpoints of a complete epoch, on the main process; best.pt where `ap` is the highest so far.

        While alphas are annealed there is no best: it would be that of a denser model than the one that is trained.
        """
        if self.alphas != self.annealed(math.inf):
            ap = -math.inf
        better, self.best = ap > self.best, max(ap, self.best)
        if not self.accelerator.is_main_process:
            return
        state = self.state_dict()
        weights = {name: state[name] for name in ("model", "average", "epoch", "global_step")}
        if better:
            write_checkpoint(folder / "best.pt", weights)
        if keep_every and self.epoch % keep_every == 0:
            write_checkpoint(folder / f"epoch-{self.epoch:04d}.pt", weights)
        write_trained(folder, state, self.last_is_whole)  # last: it says that the others of this epoch are written
        self.last_is_whole = True

    def save_midway(self, folder: Path, so_far: EpochSoFar) -> None:
        """Write last.pt in the midst of an epoch, or after its steps, before it was evaluated."""
        added = {"epoch": so_far.number, "so_far": so_far.state_dict()}  # gathers from all processes
        if self.accelerator.is_main_process:
            write_trained(folder, self.state_dict() | added, self.last_is_whole)
            self.last_is_whole = True

    def best_so_far(self, run_dir: Path) -> str:
        """In words, which epoch was the best, and how to measure it."""
        path = run_dir / "checkpoints" / "best.pt"
        if self.best < 0 or not path.exists():  # none evaluated, or none but those of alphas on their way
            return "no epoch is kept as the best"
        try:
            epoch = load_checkpoint(path, ["epoch"])["epoch"]
        except DamagedFile as error:  # which does not undo what else was trained
            return f"warning: {error}"
        measure = f"{to_measure(run_dir)} --checkpoint best"
        return f"best epoch: {epoch} of {self.epoch}, AP {self.best:.3f}; to measure it: {measure}"

    def restore(self, folder: Path) -> str:
        """Go on from the last checkpoint in `folder`, or from the one before it, of which it is said in words why.

        Of several processes the main one decides. Raises RunError naming it when it is of another architecture, or
        there is none that is whole.
        """
        state, path, why = read_trained(folder, needed=self.state_dict())
        chosen, why = broadcast_object_list([path.name, why])
        if path.name != chosen:  # as where one node alone reads wrong bytes
            path = folder / chosen
            state = load_checkpoint(path, needed=self.state_dict())
        self.last_is_whole = not why
        load_weights(self.trained, state["model"], path)
        if self.average is not None:
            load_weights(self.average, state["average"], path)
            self.averaged_steps = state["averaged_steps"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.global_step, self.best = state["epoch"], state["global_step"], state["best"]
        self.schedule.last_epoch = state["schedule"]  # the rates themselves came with the optimiser
        self._anneal()
        self.midway = state.get("so_far")
        return why


def keep_failure(state: TrainingState, run_dir: Path, batch: Batch, position: dict, what: str) -> str:
    """Keep what is needed to look into a step that failed at a position of training; where it is, and the remedy."""
    ids = [target["image_id"] for target in batch.targets]
    path = run_dir / f"failure-{state.accelerator.process_index}.pt"
    write_checkpoint(path, state.state_dict() | position | {"batch": tuple(batch), "image_ids": ids})
    remedy = "Start again"
    if (run_dir / "checkpoints" / "last.pt").exists():  # other settings are for another run
        remedy = f"Start a new run from what was saved last, train.start: {run_name(run_dir)},"
    return (
        f"{what} at step {position['global_step']} (epoch {position['epoch'] + 1}, learning rates "
        f"{position['learning_rates']}, image ids {ids}). Weights and batch are in {path}. {remedy} with a lower "
        "train.lr, train.clip_norm: 0.1, train.warmup_steps, or train.precision: float32."
    )
