"""Training: one function behind every door.

    train(cfg, run_dir)                                            a notebook cell, papermill
    detrlib train CONFIG --name NAME                a terminal, one or many GPUs, Slurm
    torchrun --nproc-per-node 4 -m detrlib.engine.loop RUN_DIR           a cluster; RUN_DIR holds config.yaml

The batch size is that of all processes together and losses are normalised over them, so a run gives the same
result on one GPU or eight. The same run folder again resumes after the last complete epoch.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from detrlib import runs
from detrlib.config import Config, load_config, replace
from detrlib.data import Batch, CocoDataset, build_dataset, collate
from detrlib.data.batch import EpochSampler
from detrlib.engine.evaluate import autocast, evaluate, initial_model, save_results
from detrlib.engine.optimizer import keep_freed_memory, lr_factor, parameter_groups
from detrlib.engine.pretrain import backbone_weights
from detrlib.engine.tracking import Tracker, show_messages
from detrlib.errors import ConfigError, NonFiniteLoss
from detrlib.files import load_checkpoint, load_weights, save_checkpoint
from detrlib.losses.criterion import Criterion
from detrlib.models import alpha_modules


def train(cfg: Config, run_dir: Path) -> dict:
    """Train with `cfg` in `run_dir`, resuming if it holds a checkpoint; returns the content of results.json.

    Raises ConfigError, DataError or RunError before any long work when something does not fit, and
    NonFiniteLoss, with everything needed to look into it saved in failure-<process>.pt.
    """
    refuse_untrainable(cfg)
    keep_freed_memory()
    accelerator = Accelerator()
    if cfg.train.batch_size % accelerator.num_processes:
        raise ConfigError(
            f"train.batch_size {cfg.train.batch_size} is not a multiple of the {accelerator.num_processes} processes"
        )
    train_set, val_set = build_dataset(cfg.data, "train"), build_dataset(cfg.data, "val")
    cfg = replace(cfg, {"model.num_classes": _num_classes(cfg, train_set)})
    with accelerator.main_process_first():
        # The others find the run begun with the same settings, which is no reason to resume.
        resume = runs.open_run(cfg, run_dir) and (run_dir / "checkpoints" / "last.pt").exists()
        weights = None
        if cfg.model.backbone.weights == "crops":
            weights = backbone_weights(cfg.model.backbone, train_set, cfg.data.image_size)
    trainer = Trainer(cfg, run_dir, accelerator, train_set, val_set, "none" if resume else weights)
    try:
        return trainer.run(resume)
    except KeyboardInterrupt:
        accelerator.print(f"\ninterrupted; the same run name continues after epoch {trainer.epoch}")
        raise
    finally:
        trainer.close()


def refuse_untrainable(cfg: Config) -> None:
    """Raise ConfigError for a model that is here to be compared with only, saying how to."""
    if cfg.model.architecture.startswith("faster_rcnn"):
        weights = f"FasterRCNN_ResNet50_FPN{'_V2' * cfg.model.architecture.endswith('v2')}_Weights"
        raise ConfigError(
            f"model.architecture {cfg.model.architecture} is here to be evaluated beside the others, not to be "
            f"trained; torchvision has its weights ({weights}.COCO_V1.get_state_dict() of torchvision.models.detection "
            "downloads them) and a training script: make a run of such a file with "
            "detrlib import FILE --as NAME, and evaluate that"
        )


def _num_classes(cfg: Config, dataset: CocoDataset) -> int:
    wanted = cfg.model.num_classes or dataset.num_classes
    if wanted < dataset.num_classes:
        raise ConfigError(
            f"model.num_classes {wanted} is too small: {dataset.annotations_path} needs {dataset.num_classes}"
            + ("" if cfg.data.contiguous else " (largest category id + 1; data.contiguous: true renumbers them)")
        )
    return wanted


class Trainer:
    """The state of a training run: what a checkpoint holds, and the loops that change it."""

    def __init__(
        self,
        cfg: Config,
        run_dir: Path,
        accelerator: Accelerator,
        train_set: CocoDataset,
        val_set: CocoDataset,
        weights: str | Path | None,
    ):
        self.cfg, self.run_dir, self.accelerator, self.val_set = cfg, run_dir, accelerator, val_set
        set_seed(cfg.train.seed)
        model = initial_model(cfg, weights)
        self.sampler = EpochSampler(
            len(train_set), cfg.train.batch_size, accelerator.process_index, accelerator.num_processes, cfg.train.seed
        )
        self.loader = DataLoader(
            train_set,
            batch_sampler=self.sampler,
            collate_fn=collate,
            num_workers=cfg.data.workers,
            pin_memory=accelerator.device.type == "cuda",
        )
        optimizer = torch.optim.AdamW(parameter_groups(model, cfg.train), weight_decay=cfg.train.weight_decay)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_factors(optimizer))
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.average = self._moving_average()
        self.criterion = Criterion(lambda x: accelerator.reduce(x, "mean"), **dict(cfg.loss))
        self.tracker = Tracker(cfg, run_dir, accelerator.is_main_process)
        self.epoch, self.global_step, self.best = 0, 0, -math.inf
        self.alpha_gradients: dict[str, float] = {}  # of the last step that is logged

    def run(self, resume: bool) -> dict:
        """Train what is left, evaluate, write the results."""
        if resume:
            self._restore()
        if self.accelerator.is_main_process:
            runs.truncate_metrics(self.run_dir, self.global_step)
        self.accelerator.wait_for_everyone()
        epochs = self.cfg.train.epochs
        while self.epoch < epochs:
            start = time.perf_counter()
            record = self._train_epoch()
            self.epoch += 1
            if self.epoch % self.cfg.train.eval_every == 0 or self.epoch == epochs:
                record |= self._validate()
            self._log(record)
            self._save(record)
            self._report(record, time.perf_counter() - start)
        model = self._weights_to_judge()
        results, detections = evaluate(model, self.val_set, self.cfg, self.accelerator, run_dir=self.run_dir)
        results |= {"checkpoint": "last", "epoch": self.epoch, "global_step": self.global_step}
        if self.accelerator.is_main_process:
            save_results(self.run_dir, results, detections, self.val_set.ground_truth)
        self.accelerator.wait_for_everyone()
        return results

    def _train_epoch(self) -> dict[str, float]:
        """One pass over the data; means of everything logged."""
        cfg, accelerator = self.cfg.train, self.accelerator
        # Order and augmentation depend on seed and epoch alone, so that a resumed run repeats an uninterrupted one.
        set_seed(cfg.seed + 1000 * (self.epoch + 1) + accelerator.process_index)
        self.sampler.epoch = self.epoch
        self.model.train()
        sums, count, clock = {}, 0, time.perf_counter()
        bar = tqdm(self.loader, desc=f"epoch {self.epoch + 1}/{cfg.epochs}", leave=False, disable=self._quiet())
        for batch in bar:
            waited = time.perf_counter() - clock
            terms = self._step(batch.to(accelerator.device))
            count += 1
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value
            if self.global_step % cfg.log_every == 0:
                took = time.perf_counter() - clock
                self._log_step(terms, {"extra/iter_time": took, "extra/data_time": waited})
                bar.set_postfix(loss=f"{terms['loss']:.3f}")
            clock = time.perf_counter()
        names = sorted(sums)
        totals = accelerator.reduce(torch.stack([sums[name] for name in names]), "mean") / count
        return {f"epoch/{name}": value for name, value in zip(names, totals.tolist(), strict=True)}

    def _step(self, batch: Batch) -> dict[str, Tensor]:
        """One update of the weights; losses, detached."""
        with autocast(self.cfg, self.accelerator.device):
            predictions = self.model(batch.images, batch.padding_mask)
        loss, terms = self.criterion(predictions, batch.targets)
        if not torch.isfinite(loss):
            self._fail(batch, loss, "loss")
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        if (self.global_step + 1) % self.cfg.train.log_every == 0:
            self.alpha_gradients = self._alpha_gradients()
        if self.cfg.train.clip_norm:
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.cfg.train.clip_norm)
            if not torch.isfinite(norm):
                self._fail(batch, norm, "gradient norm")
            terms["grad_norm"] = norm
        self.optimizer.step()
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.accelerator.unwrap_model(self.model))
        self.global_step += 1
        return {"loss": loss.detach()} | {name: value.detach() for name, value in terms.items()}

    def _fail(self, batch: Batch, value: Tensor, what: str) -> None:
        ids = [target["image_id"] for target in batch.targets]
        rates = {group["name"]: group["lr"] for group in self.optimizer.param_groups}
        path = self.run_dir / f"failure-{self.accelerator.process_index}.pt"
        save_checkpoint(path, {**self._state(), "batch": tuple(batch), "image_ids": ids, "learning_rates": rates})
        raise NonFiniteLoss(
            f"{what} is {value.item()} at step {self.global_step} (epoch {self.epoch + 1}, learning rates {rates}, "
            f"image ids {ids}). Weights and batch are in {path}; the last complete epoch is in checkpoints/last.pt. "
            "Try a lower train.lr, train.clip_norm: 0.1, train.warmup_steps, or train.precision: float32."
        )

    def _validate(self) -> dict[str, float]:
        results, _ = evaluate(
            self._weights_to_judge(),
            self.val_set,
            self.cfg,
            self.accelerator,
            criterion=Criterion(**dict(self.cfg.loss)),
            attention=False,
        )
        numbers = {name: value for name, value in results["detection"].items() if not isinstance(value, dict)}
        record = {f"val/{name}": value for name, value in results["loss"].items()}
        return record | {f"detection/{name}": value for name, value in numbers.items()}

    def _weights_to_judge(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model) if self.average is None else self.average.module

    def _moving_average(self) -> AveragedModel | None:
        decay = self.cfg.train.ema
        if not decay:
            return None
        return AveragedModel(self.accelerator.unwrap_model(self.model), multi_avg_fn=get_ema_multi_avg_fn(decay))

    def _lr_factors(self, optimizer: torch.optim.Optimizer) -> list:
        cfg, steps = self.cfg.train, max(1, len(self.sampler))
        exempt = cfg.model_copy(update={"schedule": "constant"})
        keeps = [group["name"] == "alpha" and cfg.alpha_keeps_lr for group in optimizer.param_groups]
        return [lambda step, cfg=exempt if keep else cfg: lr_factor(step, steps, cfg) for keep in keeps]

    # What is written: metrics, checkpoints, a line per epoch. Only the main process writes.

    def _log_step(self, terms: dict[str, Tensor], times: dict[str, float]) -> None:
        rates = {f"lr/{group['name']}": group["lr"] for group in self.optimizer.param_groups}
        memory = {}
        if self.accelerator.device.type == "cuda":
            memory = {"extra/memory_mb": torch.cuda.max_memory_allocated() / 2**20}
        means = self.accelerator.reduce(torch.stack(list(terms.values())), "mean").tolist()
        losses = {f"train/{name}": mean for name, mean in zip(terms, means, strict=True)}
        self._log(losses | times | memory | rates | self.alpha_gradients)

    def _alpha_gradients(self) -> dict[str, float]:
        """Gradients of pre_alpha per head and their norm per layer, before clipping: is alpha still learning?"""
        values = {}
        for place, module in alpha_modules(self.accelerator.unwrap_model(self.model)).items():
            gradient = module.pre_alpha.grad
            if gradient is None:  # alpha is held fixed
                continue
            values |= _by_head("pre_alpha_gradient", place, gradient)
            site, layer = place.split(".")
            values[f"pre_alpha_gradient_norm/{site}.layer_{layer}"] = gradient.norm().item()
        return values

    def _log(self, values: dict[str, float]) -> None:
        if not self.accelerator.is_main_process:
            return
        for place, module in alpha_modules(self.accelerator.unwrap_model(self.model)).items():
            values |= _by_head("alpha", place, module.alpha) | _by_head("pre_alpha", place, module.pre_alpha)
        record = {"global_step": self.global_step, "epoch": self.epoch} | values
        runs.append_metrics(self.run_dir, record)
        self.tracker.log(record)

    def _state(self) -> dict:
        unwrapped = self.accelerator.unwrap_model(self.model)
        return {
            "model": unwrapped.state_dict(),
            "average": self.average.module.state_dict() if self.average is not None else None,
            "averaged_steps": int(self.average.n_averaged) if self.average is not None else 0,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.last_epoch,
            "epoch": self.epoch,
            "global_step": self.global_step,
            "best": self.best,
        }

    def _save(self, record: dict[str, float]) -> None:
        ap = record.get("detection/AP", -math.inf)
        better, self.best = ap > self.best, max(ap, self.best)
        if not self.accelerator.is_main_process:
            return
        folder, every = self.run_dir / "checkpoints", self.cfg.train.keep_every
        state = self._state()
        weights = {name: state[name] for name in ("model", "average", "epoch", "global_step")}
        if better:
            save_checkpoint(folder / "best.pt", weights)
        if every and self.epoch % every == 0:
            save_checkpoint(folder / f"epoch-{self.epoch:04d}.pt", weights)
        save_checkpoint(folder / "last.pt", state)  # last: it says that the others of this epoch are written

    def _restore(self) -> None:
        path = self.run_dir / "checkpoints" / "last.pt"
        state = load_checkpoint(path)
        load_weights(self.accelerator.unwrap_model(self.model), state["model"], path)
        if self.average is not None:
            load_weights(self.average.module, state["average"], path)
            self.average.n_averaged.fill_(state["averaged_steps"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.global_step, self.best = state["epoch"], state["global_step"], state["best"]
        self.schedule.last_epoch = state["schedule"]  # the rates themselves came with the optimiser
        self.accelerator.print(f"resuming {self.run_dir.name} after epoch {self.epoch}")

    def _quiet(self) -> bool | None:
        return None if self.accelerator.is_main_process else True

    def _report(self, record: dict[str, float], seconds: float) -> None:
        left = (self.cfg.train.epochs - self.epoch) * seconds
        found = ""
        if "detection/AP" in record:
            found = f"AP {record['detection/AP']:.3f}  AP50 {record['detection/AP50']:.3f}  "
        self.accelerator.print(
            f"epoch {self.epoch:3d}/{self.cfg.train.epochs}  loss {record['epoch/loss']:.3f}  {found}"
            f"{seconds:.0f} s, about {left / 60:.0f} min left",
            flush=True,
        )

    def close(self) -> None:
        """Leave the process group in order: gloo aborts now and then if a DDP model outlives it."""
        self.tracker.finish()
        if self.accelerator.num_processes > 1 and torch.distributed.is_initialized():
            del self.model
            self.accelerator.free_memory()


def _by_head(what: str, place: str, values: Tensor) -> dict[str, float]:
    """Names for the log: ("alpha", "decoder_cross.0", [H]) -> {"alpha/decoder_cross.layer_0-head_0": ...}."""
    site, layer = place.split(".")
    return {f"{what}/{site}.layer_{layer}-head_{head}": value for head, value in enumerate(values.tolist())}


def main() -> None:
    """The door for torchrun: train in a folder that holds config.yaml."""
    show_messages()
    parser = argparse.ArgumentParser(description="Train in a run folder that holds config.yaml; for torchrun.")
    parser.add_argument("run_dir", type=runs.run_path, help="run folder with a config.yaml")
    run_dir = parser.parse_args().run_dir
    train(load_config(run_dir / "config.yaml"), run_dir)
    Accelerator().end_training()


if __name__ == "__main__":
    main()
