"""Training: one function behind every door.

    train(cfg, run_dir)                                                  a notebook cell, papermill
    detrlib train CONFIG --name NAME                                     a terminal, one or many GPUs, Slurm
    torchrun --nproc-per-node 4 -m detrlib.engine.loop RUN_DIR           a cluster; RUN_DIR holds config.yaml

The batch size is that of all processes together and losses are normalised over them, so a run gives the same
result on one GPU or eight, but for dropout. The same run folder again resumes where it was saved last: after an epoch,
in the midst of one every `train.save_minutes`, and after the step in which a signal came, see `stopping`.

What a person should know is said in this order, nothing of it twice:

    before a model is made      the data (`look_over`), objects that a backbone from crops will not learn from
    before the first step       weights that it starts from, memory, the floor of AP, too few updates
    after the first steps       how long it will take, and again each minute (`pace`)
    after an epoch              loss and AP; after the first, much padding; from the middle on, signs of collapse
    at the end                  the best epoch
"""

import argparse
import math
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from detrlib import runs
from detrlib.config import Config
from detrlib.data import Batch, CocoDataset, look_over
from detrlib.data.batch import EpochSampler, batches, open_loader
from detrlib.engine import advice, tracking
from detrlib.engine.agent import started
from detrlib.engine.epoch import EpochSoFar
from detrlib.engine.evaluate import evaluate, keep_fixed_boxes, run_floor, save_results
from detrlib.engine.log import Log
from detrlib.engine.memory import SMALLER, Plan, keep_freed_memory
from detrlib.engine.pace import Pace
from detrlib.engine.presented import present
from detrlib.engine.ready import ready
from detrlib.engine.space import checkpoint_space
from detrlib.engine.start import initial_model, learns_from_crops, record_start, starting_model
from detrlib.engine.state import TrainingState, keep_failure
from detrlib.engine.step import Pending, train_step
from detrlib.engine.stopping import Stopping, Wish
from detrlib.errors import RunError, Stopped
from detrlib.losses.criterion import Criterion
from detrlib.metrics.collapse import signs_of_collapse
from detrlib.models import checkpoint_activations
from detrlib.runs.owner import owning

LOOKED_AT = 64  # images whose attention is measured while training goes on


@owning
def train(cfg: Config, run_dir: Path) -> dict:
    """Train in `run_dir`, or go on where it holds a checkpoint; in each of the processes that torchrun started.

    On a CPU it is faster after `keep_freed_memory`, which the doors (`launch`, torchrun) call and this function does
    not, since it changes the whole process it is called in.

    Args:
        cfg: every setting; train.batch_size is that of all processes together.
        run_dir: the run folder, made if it is not there.

    Returns:
        What results.json holds, see `evaluate`.

    Raises:
        ConfigError, DataError, WeightsError, RunError: something does not fit; before any long work.
        Stopped: a signal came; it is saved, and the same call goes on.
        NonFiniteLoss: with everything needed to look into it saved in failure-<process>.pt.
    """
    services = {"log_with": tracking.trackers(cfg, run_dir), "project_dir": run_dir / tracking.TRACKING}
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), **services)  # or they would train one run each
    stopping = Stopping(accelerator, cfg.train.save_minutes)
    with stopping, closing(_open_trainer(cfg, run_dir, accelerator, stopping)) as trainer:
        return trainer.run()


def _open_trainer(cfg: Config, run_dir: Path, accelerator: Accelerator, stopping: Stopping) -> "Trainer":
    """Check all that could stand in the way, before anything is written; then make the run folder and the model."""
    say = partial(tracking.say, accelerator)
    cfg, splits, described = ready(cfg, accelerator.num_processes, accelerator.device)
    train_set, val_set = splits.values()
    with accelerator.main_process_first():
        resume = runs.refuse_run(cfg, run_dir, described)
        first = None  # weights that are given are found before every picture is decoded, others are learned from them
        if not (resume or learns_from_crops(cfg)):
            first = starting_model(cfg, train_set)
        say(look_over(splits, cfg.model.num_queries, cfg.data.check))
        if not resume:
            say(*runs.begins_again(run_dir), *advice.unfit_for_crops(cfg, train_set))
        model, start = (initial_model(cfg, "none"), None) if resume else first or starting_model(cfg, train_set)
        if accelerator.is_main_process:  # not before it is known that there is something to start from
            runs.begin_folder(run_dir, cfg, described)
            if not resume:
                record_start(run_dir, start)
    if start:
        say(start)
    return Trainer(cfg, run_dir, accelerator, stopping, train_set, val_set, model, resume)


class Trainer:
    """The loop over epochs and batches, and what it writes."""

    def __init__(
        self,
        cfg: Config,
        run_dir: Path,
        accelerator: Accelerator,
        stopping: Stopping,
        train_set: CocoDataset,
        val_set: CocoDataset,
        model: nn.Module,
        resume: bool,
    ):
        self.cfg, self.run_dir, self.accelerator, self.val_set = cfg, run_dir, accelerator, val_set
        self.stopping, self.resume, self.say = stopping, resume, partial(tracking.say, accelerator)
        set_seed(cfg.train.seed)
        shared = accelerator.process_index, accelerator.num_processes
        given = cfg.train.batch_size, *shared, cfg.train.seed, cfg.train.epoch_updates
        self.sampler = EpochSampler(len(train_set), *given)
        self.loader = open_loader(train_set, cfg.data, accelerator.device.type == "cuda", batch_sampler=self.sampler)
        checkpoint_activations(model, cfg.train.checkpoint_activations)
        self.state = TrainingState(model, cfg, len(self.sampler), accelerator)
        self.plan = Plan(cfg, self.state.trained, train_set, self.sampler.own_size, accelerator)
        self.micro_batch = self.plan.images(run_dir)
        self.criterion = Criterion(stopping.mean, **dict(cfg.loss))
        self.pending = Pending()  # whether the last update was one
        self.so_far: EpochSoFar | None = None  # the epoch that is not over
        self.log = Log(cfg, run_dir, accelerator, self.state, self.criterion.weights)
        self.pace = Pace(cfg.train, len(self.sampler), len(val_set) / cfg.train.batch_size)
        self.floor, self.warned = {}, set()  # see `run_floor`; signs of collapse that were said
        self.final: tuple | None = None  # results and detections of `evaluate` after the last epoch
        tracking.start_tracking(accelerator, cfg)

    def run(self) -> dict:
        """Train what is left, evaluate, write the results; or, once a signal has come, save and raise Stopped."""
        self._prepare()
        self.stopping.training = True
        try:
            return self._finish()
        except Stopped:
            pass  # where it was, the model is still in use, see `close`
        self._save_midway()
        if self.accelerator.is_main_process:
            runs.note_stop(self.run_dir, self.state.global_step, self.stopping.name)
            self.say(self.state.best_so_far(self.run_dir))
        self.accelerator.wait_for_everyone()  # or torchrun ends the one that saves, once another has left
        raise Stopped(f"stopped by {self.stopping.name} at {self._where()}, and saved; the same run name goes on there")

    def _finish(self) -> dict:
        """All that is left, and the results."""
        state, epochs = self.state, self.cfg.train.epochs
        while state.epoch < epochs:
            start = time.perf_counter()
            record = self._train_epoch()
            state.epoch += 1
            if state.epoch % self.cfg.train.eval_every == 0 or state.epoch == epochs:
                began = time.perf_counter()
                record |= self._validate()
                self.pace.evaluations.append(time.perf_counter() - began)
            self.log.write(record)
            state.save(self.run_dir / "checkpoints", record.get("detection/AP", -math.inf), self.cfg.train.keep_every)
            self.stopping.saved()
            self.so_far = None
            self._report(record, time.perf_counter() - start)
        if self.final is None:  # a run that goes on after its last epoch
            self._validate()
        results, detections = self.final
        results |= {"checkpoint": "last", "epoch": state.epoch, "global_step": state.global_step} | self.floor
        self.warned.clear()
        self._warn(results)
        if self.accelerator.is_main_process:
            save_results(self.run_dir, results, detections, self.val_set.ground_truth)
            present(self.accelerator, self.cfg, self.run_dir)
            self.say(state.best_so_far(self.run_dir))
        self.accelerator.wait_for_everyone()
        return results

    def _prepare(self) -> None:
        """Restore what was saved, make the run folder ready, and say what training takes and what it has to beat."""
        if self.resume:
            why = self.state.restore(self.run_dir / "checkpoints")
            if self.state.midway:
                self.so_far = EpochSoFar(self.state.epoch, self.cfg.train.seed, self.accelerator)
                self.so_far.load_state_dict(self.state.midway)
            self.say(*[why] * bool(why), f"resuming {runs.run_name(self.run_dir)} at {self._where()}")
        if self.accelerator.is_main_process:
            runs.truncate_metrics(self.run_dir, self.state.global_step, self.state.epoch)
            runs.note_start(self.run_dir, self.state.global_step)
            self.say(self.plan.line(self.micro_batch))
            if not self.resume:
                keep_fixed_boxes(self.run_dir, self.loader.dataset)
        self.say(checkpoint_space(self.state, self.cfg.train, self.run_dir / "checkpoints"))
        self.accelerator.wait_for_everyone()
        self.floor = run_floor(self.run_dir, self.val_set, self.cfg.evaluate.engine)
        settings = self.cfg.train
        updates = settings.epochs * len(self.sampler)
        self.say(*advice.floor_and_collapse(self.floor), *advice.few_updates(self.cfg, updates))
        self.say(*advice.divided_statistics(self.state.trained, self.micro_batch, settings.batch_size))
        self.say(*advice.idle_settings(self.cfg))
        if settings.compile:
            self.state.compile()

    def _train_epoch(self) -> dict[str, float]:
        """One epoch, or what is left of it; means of everything logged."""
        cfg, state = self.cfg.train, self.state
        so_far = self.so_far = self.so_far or EpochSoFar(state.epoch, cfg.seed, self.accelerator)
        so_far.begin()
        self.sampler.epoch, self.sampler.first = state.epoch, so_far.steps
        state.model.train()
        bar = tracking.progress(self.loader, f"epoch {state.epoch + 1}/{cfg.epochs}", initial=so_far.steps, lines=False)
        clock = time.perf_counter()
        for batch in batches(bar):
            waited, padding = time.perf_counter() - clock, batch.padding
            terms = self._step(batch)
            so_far.add(terms, padding)
            if state.global_step % cfg.log_every == 0:
                took = time.perf_counter() - clock
                self.pending.read()
                self.log.step(terms, {"extra/iter_time": took, "extra/data_time": waited})
                bar.set_postfix(loss=f"{terms['loss']:.3f}")
            if line := self.pace.step(time.perf_counter() - clock, so_far.steps - 1, state.epoch):
                self.say(line)
            if (wish := self.stopping.agreed()) is Wish.STOP:
                raise Stopped("after a step")
            if wish is Wish.SAVE:
                self._save_midway()
            clock = time.perf_counter()
        self.pending.read()
        return so_far.means()

    def _save_midway(self) -> None:
        """Write last.pt where an epoch is not over; all processes at once."""
        if self.so_far is not None:
            self.pending.read()
            self.state.save_midway(self.run_dir / "checkpoints", self.so_far)
        self.stopping.saved()

    def _where(self) -> str:
        """In words, how far training has come."""
        epochs, midway = self.state.epoch, ""
        if self.so_far is not None:
            epochs, midway = self.so_far.number, f" and {self.so_far.steps} of {len(self.sampler)} updates"
        return f"step {self.state.global_step}, after epoch {epochs} of {self.cfg.train.epochs}{midway}"

    def _step(self, batch: Batch) -> dict[str, Tensor]:
        """`train_step`, and what moves along with the weights."""
        cfg, state = self.cfg.train, self.state
        parts = batch.split(self.micro_batch, keep_padding=self.cfg.model.padding_matters)
        given = state.model, parts, self.criterion, state.optimizer, self.accelerator
        told = {"precision": cfg.precision, "clip_norm": cfg.clip_norm, "watch": self.log.watch}
        explain = partial(keep_failure, state, self.run_dir, batch, state.position)
        try:
            terms = train_step(*given, **told, pending=self.pending, explain=explain)
        except torch.OutOfMemoryError:
            size = " x ".join(map(str, batch.pixels.shape[-2:]))
            raise RunError(
                f"the GPU has not enough memory for {self.micro_batch} images in a batch of {size} pixels at step "
                f"{state.global_step}; set {SMALLER}, and start again: the same run goes on where it was saved last"
            ) from None
        state.advance()
        return terms

    def _validate(self) -> dict[str, float]:
        last = self.state.epoch == self.cfg.train.epochs
        asked = {"run_dir": self.run_dir} if last else {"sites": ("decoder_cross",), "looked_at": LOOKED_AT}
        asked |= {"criterion": Criterion(**dict(self.cfg.loss)), "stop": self.stopping.asked}
        results, detections = evaluate(self.state.evaluated, self.val_set, self.cfg, self.accelerator, **asked)
        if last:
            self.final = results, detections
        numbers = {name: value for name, value in results["detection"].items() if not isinstance(value, dict)}
        record = {f"val/{name}": value for name, value in results.pop("loss").items()}
        record |= {f"spread/{name}": value for name, value in results["spread"].items()}
        if self.cfg.train.epochs <= 2 * self.state.epoch < 2 * self.cfg.train.epochs:
            self._warn(results | self.floor)  # before, all models are like that
        return record | {f"detection/{name}": value for name, value in numbers.items()}

    def _warn(self, results: dict) -> None:
        """Say what looks collapsed, each sign once."""
        signs = signs_of_collapse(results)
        for name in [name for name in signs if name not in self.warned]:
            self.say(f"warning: {signs[name]}")
        self.warned |= set(signs)

    def _report(self, record: dict[str, float], seconds: float) -> None:
        epoch, epochs, updates = self.state.epoch, self.cfg.train.epochs, self.state.global_step
        precision = ""
        if record.get("detection/AP", -1) >= 0:  # undefined without objects
            precision = f"AP {record['detection/AP']:.3f}  AP50 {record['detection/AP50']:.3f}  "
        left = self.pace.left(epoch) if epoch < epochs else None
        passes = updates * self.sampler.batch_size / self.sampler.length
        self.say(
            f"epoch {epoch:3d}/{epochs}  {updates} updates ({passes:.1f} passes)  "
            f"loss {record['epoch/loss']:.3f}  {precision}"
            f"{seconds:.0f} s" + ("" if left is None else f", about {tracking.duration(left)} left"),
            *(advice.much_padding(record["extra/padding"], self.cfg.data) if epoch == 1 else ()),
        )

    def close(self) -> None:
        """Finish tracking and leave the process group in order: gloo aborts now and then if a DDP model outlives it."""
        del self.state, self.log
        self.accelerator.free_memory()
        self.accelerator.end_training()


def main() -> None:
    """The door for torchrun: train in a folder that holds config.yaml."""
    parser = argparse.ArgumentParser(description="Train in a run folder that holds config.yaml; for torchrun.")
    parser.add_argument("run_dir", type=runs.run_path, help="run folder with a config.yaml")
    keep_freed_memory()
    with started():
        run_dir = parser.parse_args().run_dir
        train(runs.run_config(run_dir), run_dir)


if __name__ == "__main__":
    main()
