"""The smallest training run that passes through every part of the code: a second on one CPU core."""

import json
import os

from detrlib.config import load_config

os.environ["ACCELERATE_USE_CPU"] = "true"  # runs are compared bit for bit, which no GPU promises

SETTINGS = {
    "data.shapes": {"train": 32, "val": 13, "size": 64},
    "data.image_size": 64,
    "data.augment": "flip",
    "data.workers": 0,
    "model.backbone": {"name": "tiny", "weights": "none"},
    "model.hidden_dim": 32,
    "model.num_heads": 4,
    "model.encoder_layers": 1,
    "model.decoder_layers": 2,
    "model.feedforward_dim": 32,
    "model.num_queries": 10,
    "train.epochs": 2,
    "train.batch_size": 8,
    "train.lr": 1e-3,
    "train.lr_backbone": 1e-3,
    "train.log_every": 1,
    "evaluate.examples": 2,
}
STEPS = 4  # per epoch


def tiny_config(overrides=None):
    """The settings of a tiny run with dotted `overrides`."""
    return load_config(None, SETTINGS | (overrides or {}))


def metrics_without_times(run_dir):
    """Records of metrics.jsonl without what a clock has measured."""
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in record.items() if not k.startswith("extra/")} for record in records]
