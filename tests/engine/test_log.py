"""What is written while training goes on, and when; names and values are those of whole runs in test_loop."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from detrlib.engine.log import Log
from detrlib.engine.optimizer import build_optimizer
from detrlib.engine.start import initial_model


@pytest.fixture
def log(tmp_path, tiny_config):
    cfg = tiny_config({"model.num_classes": 7, "model.attention.decoder_cross": "alpha_entmax", "train.log_every": 2})
    model = initial_model(cfg)
    state = SimpleNamespace(trained=model, global_step=0, epoch=3, alphas={}, learning_rates={"rest": 0.5})
    state.optimizer = build_optimizer(model, cfg.train)
    return Log(cfg, tmp_path, Accelerator(cpu=True), state, {"loss_bbox": 5.0})


def test_gradients_of_alpha_are_those_of_steps_that_are_logged(log):
    for parameter in log.state.trained.parameters():
        parameter.grad = torch.ones_like(parameter)
    log.watch()
    assert log.alpha_gradients == {} and not len(log.gradient_norms)
    log.state.global_step = 1  # the next update is the second
    log.watch()
    assert log.alpha_gradients["pre_alpha_gradient/decoder_cross.layer_0-head_0"] == 1.0
    log.step({"loss": torch.tensor(2.0)}, {})
    (record,) = map(json.loads, (log.run_dir / "metrics.jsonl").read_text().splitlines())
    decoder = sum(p.numel() for p in log.state.trained.transformer.decoder.layers[1].parameters())
    assert record["gradient_norm/decoder.layer_1"] == pytest.approx(decoder**0.5)
    assert record["gradient_norm_group/alpha"] == pytest.approx((2 * 4) ** 0.5)  # layers and heads


def test_a_record_says_where_it_was_made_and_what_was_learned_by_then(log):
    log.step({"loss": torch.tensor(2.0)}, {"extra/iter_time": 0.1})
    (record,) = map(json.loads, (log.run_dir / "metrics.jsonl").read_text().splitlines())
    expected = {"global_step": 0, "epoch": 3, "train/loss": 2.0, "extra/iter_time": 0.1, "lr/rest": 0.5}
    assert record.items() > expected.items() and 1 < record["alpha/decoder_cross.layer_1-head_3"] < 2


def test_only_the_main_process_writes(log):
    log.accelerator = SimpleNamespace(is_main_process=False)
    log.write({"train/loss": 1.0})
    assert not (log.run_dir / "metrics.jsonl").exists()
