"""What is written while training goes on: metrics.jsonl in the run folder, and what services show."""

from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from detrlib import runs
from detrlib.config import Config
from detrlib.engine import tracking
from detrlib.engine.state import TrainingState


class Log:
    """Of a training; every process asks, the main one writes. weights: of the losses, see `tracking.panels`."""

    def __init__(
        self,
        cfg: Config,
        run_dir: Path,
        accelerator: Accelerator,
        state: TrainingState,
        weights: Mapping[str, float],
    ):
        self.every, self.run_dir, self.accelerator = cfg.train.log_every, run_dir, accelerator
        self.state, self.weights = state, weights
        self.norms = tracking.GradientNorms(state.trained, state.optimizer.param_groups)
        self.alpha_gradients: dict[str, float] = {}  # of the last step that is logged
        self.gradient_norms = torch.zeros(0)  # likewise, still on the device

    def watch(self) -> None:
        """Gradients before clipping, of steps that are logged: of each alpha, and norms by layer and group."""
        if (self.state.global_step + 1) % self.every == 0:
            self.alpha_gradients = tracking.alpha_gradients(self.state.trained)
            self.gradient_norms = self.norms.measure()

    def step(self, terms: dict[str, Tensor], times: dict[str, float]) -> None:
        """One step: the means of its terms over the processes, learning rates, and what it has taken."""
        rates = {f"lr/{name}": rate for name, rate in self.state.learning_rates.items()}
        memory = {}
        if self.accelerator.device.type == "cuda":
            memory = {"extra/memory_mb": torch.cuda.max_memory_allocated() / 2**20}
        means = self.accelerator.reduce(torch.stack(list(terms.values())), "mean").tolist()
        losses = {f"train/{name}": mean for name, mean in zip(terms, means, strict=True)}
        norms = dict(zip(self.norms.members, self.gradient_norms.tolist(), strict=False))  # none were watched
        self.write(losses | times | memory | rates | norms | self.alpha_gradients)

    def write(self, values: dict[str, float]) -> None:
        """A record, with what transforms have learned so far."""
        if not self.accelerator.is_main_process:
            return
        values |= tracking.learned_by_head(self.state.trained)
        values |= {f"alpha/{site}": alpha for site, alpha in self.state.alphas.items()}
        record = {"global_step": self.state.global_step, "epoch": self.state.epoch} | values
        runs.append_metrics(self.run_dir, record)
        self.accelerator.log(tracking.panels(record, self.weights), step=self.state.global_step)
