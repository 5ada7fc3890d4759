"""What a run logs, and Weights & Biases with and without an account or a network."""

import errno
import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from detrlib import runs
from detrlib.config import PROJECT, save_config
from detrlib.engine import tracking
from detrlib.engine.loop import train
from detrlib.engine.tracking import MAIN, panels
from detrlib.errors import ConfigError

STEPS = 4  # per epoch of a tiny run


def test_one_process_shows_a_bar_where_there_is_a_terminal_its_own_or_that_of_the_launcher(monkeypatch, capsys):
    def shown():
        assert list(tracking.progress(range(3), "counting")) == [0, 1, 2]
        return "counting" in capsys.readouterr().err

    assert not shown()  # of tests
    monkeypatch.setenv(tracking.PROGRESS, "1")
    assert shown()
    monkeypatch.setenv("RANK", "1")
    assert not shown()


def test_without_a_terminal_a_line_says_now_and_then_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr(tracking, "EVERY", 0)
    assert list(tracking.progress(range(3), "counting")) == [0, 1, 2]
    assert re.search(r"counting: 2 of 3 after [\d:]+, about [\d:]+ left\n", capsys.readouterr().err)
    for _ in tracking.progress(range(2), "outer"):
        assert list(tracking.progress(range(2), "inner")) == [0, 1]
    assert (
        "\x1b" not in (said := capsys.readouterr().err) and "inner: 1 of 2" in said
    )  # no terminal, whose cursor moves
    for quiet in ({"shown": False}, {"lines": False}):
        assert list(tracking.progress(range(3), "counting", **quiet)) == [0, 1, 2] and not capsys.readouterr().err


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    """The real library, without an account, and with everything it is given recorded."""
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB__SERVICE_WAIT", "300")
    wandb.logged, real = [], wandb.init

    def init(**arguments):
        run = real(**arguments)
        log = run.log
        run.log = lambda values, **named: (wandb.logged.append(values), log(values, **named))
        return run

    monkeypatch.setattr(wandb, "init", init)
    yield wandb
    wandb.teardown()


def test_tracking_offline_needs_no_account_and_groups_metrics(tmp_path, wandb, tiny_config):
    cfg = tiny_config({"train.tracking.wandb": "offline", "model.attention.decoder_cross": "alpha_entmax"})
    train(cfg, tmp_path / "run")
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    groups = {name.split("/")[0] for record in wandb.logged for name in record if "/" in name}
    assert groups == {
        *("train-main-metrics", "train-metrics", "train-extra-metrics"),
        *("train-epoch-main-metrics", "train-epoch-metrics"),
        *("val-epoch-metrics", "val-AP", "spread", "lr"),
        *("alpha", "pre_alpha", "pre_alpha_gradient", "pre_alpha_gradient_norm"),
        *("gradient_norm", "gradient_norm_group", "examples"),
    }
    names = {name for record in wandb.logged for name in record}
    assert {"train-main-metrics/loss_giou", "train-metrics/loss_giou_0", "val-AP/AP50", "lr/alpha"} <= names
    main = {name for name in names if name.startswith("train-epoch-main-metrics/")}
    assert {name.split("/")[1] for name in main} == set(MAIN)
    assert "alpha/decoder_cross.layer_1-head_3" in names
    steps = [record["global_step"] for record in wandb.logged]
    assert steps == sorted(steps) and steps[-1] == 2 * STEPS


def test_main_losses_are_shown_weighted_and_again_as_they_are():
    record = {"global_step": 3, "lr/rest": 0.1, "extra/iter_time": 1.0, "val/loss_bbox": 4.0, "detection/AP": 0.5}
    record |= {"train/loss": 9.0, "train/loss_bbox": 2.0, "train/loss_bbox_0": 3.0, "train/class_error": 50.0}
    record |= {"epoch/loss_bbox": 1.0, "epoch/loss_bbox_0": 7.0, "train/grad_norm": 0.1}
    assert panels(record, {"loss_bbox": 5.0}) == {
        **{"global_step": 3, "lr/rest": 0.1, "train-extra-metrics/iter_time": 1.0},
        **{"val-epoch-metrics/loss_bbox": 4.0, "val-AP/AP": 0.5},
        **{"train-main-metrics/loss": 9.0, "train-main-metrics/loss_bbox": 10.0},
        **{"train-metrics/loss_bbox": 2.0, "train-metrics/loss_bbox_0": 3.0, "train-main-metrics/class_error": 50.0},
        **{"train-epoch-main-metrics/loss_bbox": 5.0, "train-epoch-metrics/loss_bbox": 1.0},
        **{"train-epoch-metrics/loss_bbox_0": 7.0, "train-metrics/grad_norm": 0.1},
    }


def test_a_run_that_goes_on_is_the_same_one_and_may_go_back_in_steps(tmp_path, wandb, tiny_config):
    cfg = tiny_config({"train.tracking.wandb": "offline", "train.tracking.group": "mine", "train.epochs": 1})
    run_dir = runs.RUNS / "a-sweep" / tmp_path.name
    tracker = tracking.WandB(cfg, run_dir)
    assert tracker.init_kwargs["name"] == f"a-sweep/{tmp_path.name}" and tracker.init_kwargs["resume"] == "allow"
    assert tracker.init_kwargs["id"] == f"a-sweep-{tmp_path.name}" and tracker.init_kwargs["group"] == "mine"
    tracker.init_kwargs["dir"] = tmp_path
    tracker.start()
    for step in (5, 6, 5):
        tracker.log({"lr/rest": 0.1}, step=step)
    tracker.finish()
    assert [values["global_step"] for values in wandb.logged] == [5, 6, 5]


def test_further_services_are_those_that_are_installed(tmp_path, monkeypatch, tiny_config):
    cfg = tiny_config({"train.tracking.also": ["tensorboard"], "train.epochs": 1})
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["tensorboard"])
    assert tracking.trackers(cfg, tmp_path) == ["tensorboard"]
    monkeypatch.setattr(tracking, "get_available_trackers", list)
    with pytest.raises(ConfigError, match=r"train\.tracking\.also: tensorboard"):
        train(cfg, tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Service(GeneralTracker):
    """Remembers what it is given."""

    name, requires_logging_directory, main_process_only, tracker = "service", False, True, None

    def __init__(self):
        super().__init__()
        self.settings, self.logged = {}, []

    def store_init_configuration(self, values):
        self.settings |= values

    def log(self, values, step=None):
        self.logged.append(values)


def test_other_services_are_given_the_settings_flat_and_plain(tmp_path, monkeypatch, tiny_config):
    service, projects = Service(), []
    monkeypatch.setattr(tracking, "trackers", lambda cfg, run_dir: [service])
    real = Accelerator.init_trackers
    monkeypatch.setattr(
        Accelerator, "init_trackers", lambda self, *given: (projects.append(given[0]), real(self, *given))[1]
    )
    train(tiny_config({"train.tracking.project": "mine", "train.epochs": 1}), tmp_path / "run")
    assert projects == ["mine"] and service.settings["train.tracking.project"] == "mine"
    assert service.settings["train.epochs"] == 1 and service.settings["train.lr_alpha"] == "None"
    assert {type(value) for value in service.settings.values()} <= {bool, int, float, str}
    assert any("val-AP/AP" in values for values in service.logged)


def test_tensorboard_writes_into_the_run_folder(tmp_path, tiny_config):
    pytest.importorskip("tensorboard")
    train(tiny_config({"train.tracking.also": ["tensorboard"], "train.epochs": 1}), tmp_path / "run")
    assert list((tmp_path / "run" / "tracking").rglob("events.out.*"))


def test_alpha_and_its_gradients_are_logged_by_layer_and_head(tmp_path, tiny_config):
    learned = {"model.attention.decoder_cross": "alpha_entmax", "model.attention.null_key": "learned"}
    train(tiny_config(learned), tmp_path / "run")
    records = [record for record in runs.read_metrics(tmp_path / "run") if "train/loss" in record]
    for record in records:
        for layer in range(2):
            place = f"decoder_cross.layer_{layer}"
            gradients = [record[f"pre_alpha_gradient/{place}-head_{head}"] for head in range(4)]
            assert all(gradients)
            assert record[f"pre_alpha_gradient_norm/{place}"] == pytest.approx(math.hypot(*gradients), rel=1e-5)
            alpha, raw = (record[f"{name}/{place}-head_3"] for name in ("alpha", "pre_alpha"))
            assert alpha == pytest.approx(1.01 + 0.99 / (1 + math.exp(-raw)), rel=1e-5)
            assert record[f"null_score/{place}-head_3"] != 0
    assert len({record["pre_alpha_gradient/decoder_cross.layer_0-head_0"] for record in records}) == len(records)


def test_a_service_that_cannot_be_reached_makes_the_run_an_offline_one(
    tmp_path, wandb, monkeypatch, caplog, tiny_config
):
    working = wandb.init

    def unreachable(mode, **arguments):
        if mode == "online":
            raise wandb.errors.CommError("no route to host")
        return working(mode=mode, **arguments)

    monkeypatch.setattr(wandb, "init", unreachable)
    train(tiny_config({"train.tracking.wandb": "online", "train.epochs": 1}), tmp_path / "run")
    assert "no route to host" in caplog.text
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert (tmp_path / "run" / "results.json").exists()


def test_norms_of_gradients_by_layer_and_by_group_are_parts_of_that_of_all(tmp_path, tiny_config):
    train(tiny_config({"model.attention.decoder_cross": "alpha_entmax", "train.epochs": 1}), tmp_path / "run")
    for record in runs.read_metrics(tmp_path / "run"):
        if "train/loss" not in record:
            continue
        parts = {"gradient_norm/": [], "gradient_norm_group/": []}
        for name, value in record.items():
            parts.get(name.partition("/")[0] + "/", []).append(value)
        assert len(parts["gradient_norm/"]) >= 8 and len(parts["gradient_norm_group/"]) == 3  # rest, backbone, alpha
        for norms in parts.values():
            assert math.hypot(*norms) == pytest.approx(record["train/grad_norm"], rel=1e-5)


@pytest.mark.parametrize(
    "name, layer",
    {
        "transformer.decoder.layers.1.self_attn.in_proj_weight": "decoder.layer_1",
        "model.model.encoder.layers.0.fc1.weight": "encoder.layer_0",
        "transformer.decoder.box_position.layers.0.weight": "decoder",
        "backbone.body.layer4.0.conv1.weight": "backbone.layer_4",
        "backbone.body.layers.2.blocks.0.mlp.fc1.weight": "backbone.layer_2",
        "backbone.body.conv1.weight": "backbone",
        "bbox_embed.2.layers.0.weight": "heads",
        "input_proj.weight": "other",
    }.items(),
)
def test_a_parameter_belongs_to_a_layer(name, layer):
    assert tracking.layer_of(name) == layer


def _track(run_dir, timeout, **environment):
    """Track one number online in a process without a terminal; what it prints at the end is the mode."""
    code = (
        "import sys; from pathlib import Path; from detrlib.config import load_config\n"
        "from accelerate import Accelerator; from detrlib.engine.tracking import start_tracking, trackers\n"
        "cfg, run_dir = load_config(None, {'train.tracking.wandb': 'online'}), Path(sys.argv[1])\n"
        "accelerator = Accelerator(cpu=True, log_with=trackers(cfg, run_dir)); start_tracking(accelerator, cfg)\n"
        "accelerator.log({'train/loss': 2.0}, step=1); mode = accelerator.trackers[0].run.settings.mode\n"
        "accelerator.end_training(); print('mode:', mode)"
    )
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    inherited |= {"HOME": str(run_dir), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    run_dir.mkdir()
    return subprocess.run(
        [sys.executable, "-c", code, str(run_dir)],
        cwd=PROJECT,
        env=inherited | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def test_online_tracking_without_an_account_neither_asks_nor_fails(tmp_path):
    done = _track(tmp_path / "run", timeout=60)
    assert done.returncode == 0, done.stderr
    assert "mode: offline" in done.stdout
    assert "continuing offline" in done.stderr


@pytest.mark.slow
def test_online_tracking_with_an_account_but_no_network_goes_on_offline(tmp_path):
    done = _track(tmp_path / "run", timeout=120, WANDB_API_KEY="0" * 40, WANDB_INIT_TIMEOUT="5")
    assert done.returncode == 0, done.stderr
    assert "mode: offline" in done.stdout


def test_an_agent_of_a_sweep_hands_out_settings_to_a_run_of_its_id(tmp_path, wandb, monkeypatch, tiny_config):
    """With the file in the README, and the agent's own code, but for the server that would say what to run."""
    (text,) = re.findall(r"```yaml\n(program.*?)```", (PROJECT / "papermill_runs/README.md").read_text(), re.DOTALL)
    save_config(tiny_config({"train.epochs": 1}), tmp_path / "tiny.yaml")
    for theirs, ours in {
        ".venv/bin/detrlib": f"{sys.executable} -m detrlib",
        "papermill_runs/configs/shapes.yaml": str(tmp_path / "tiny.yaml"),
        "lr-search/": f"{tmp_path}/lr-search/",
    }.items():
        assert theirs in text
        text = text.replace(theirs, ours)
    sweep = yaml.safe_load(text)
    assert sweep["metric"]["name"] == next(iter(panels({"detection/AP": 0.5}, {})))
    given = {"train.lr": 1e-05, "model.attention.decoder_cross": "sparsemax", "train.tracking.wandb": "offline"}
    assert given.keys() == sweep["parameters"].keys()
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_DIR", "WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):
        monkeypatch.setenv(name, str(tmp_path) if name == "WANDB_DIR" else "mine")
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    agent = wandb.wandb_agent.Agent(api=None, queue=None, sweep_id="mine")
    agent._sweep_command = sweep["command"]
    handed_out = {name: {"value": value} for name, value in given.items()}
    agent._command_run({"program": sweep["program"], "run_id": "first1", "args": handed_out})
    assert agent._run_processes["first1"].wait() == 0
    run_dir = tmp_path / "lr-search" / "first1"
    cfg = runs.run_config(run_dir)
    assert cfg.train.lr == 1e-05 and cfg.model.attention.decoder_cross == "sparsemax"
    assert list(run_dir.glob("wandb/offline-run-*-first1/*.wandb"))  # by W&B's own id, under which an agent resumes


def test_ids_of_wandb_are_taken_by_it_and_differ_as_names_do():
    names = [
        "first",
        "sweep/first",
        "lr:1e-4",
        "lr/1e-4",
        "lr;1e-4",
        "实验",
        "实践",
        "a" * 64,
        "a" * 65,
        "a" * 66,
        "a$b",
        "a b",
    ]
    ids = [tracking.wandb_id(name) for name in names]
    assert len(set(ids)) == len(ids) and ids[:2] == ["first", "sweep-first"]  # as ever, for runs that go on
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", one) for one in ids)


def test_what_is_said_comes_from_one_process_of_all_nodes(capsys):
    for main in (True, False):  # the accelerator's own print speaks in one of each node
        tracking.say(SimpleNamespace(is_main_process=main, print=print), "a line")
    assert capsys.readouterr().out == "a line\n"


def test_a_terminal_that_was_closed_ends_no_training():
    def closed(*_, **named):
        raise OSError(errno.EIO, "Input/output error")

    tracking.say(SimpleNamespace(is_main_process=True, print=closed), "a line")
