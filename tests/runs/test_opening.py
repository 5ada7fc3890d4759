"""What may begin or go on in a run folder."""

import json
import shutil

import pytest

from detrlib import runs
from detrlib.config import load_config
from detrlib.data import build_dataset, describe_data
from detrlib.errors import ConfigError, RunError
from detrlib.files import write_checkpoint, write_json


def test_opening_a_new_an_unfinished_and_a_finished_run(tmp_path, tiny_config):
    run_dir, cfg = tmp_path / "a" / "run", tiny_config()
    assert runs.open_run(cfg, run_dir) is False
    assert load_config(run_dir / "config.yaml") == cfg
    environment = json.loads((run_dir / "environment.json").read_text())
    assert {"commit", "uncommitted_changes", "python", "packages", "cpu_cores", "gpus"} <= environment.keys()
    assert runs.open_run(cfg, run_dir) is True
    free = {"data.workers": 0, "data.cache": True, "train.log_every": 7, "evaluate.batch_size": 3}
    assert runs.open_run(tiny_config(free | {"train.tracking.wandb": "offline"}), run_dir) is True
    assert runs.open_run(tiny_config(free | {"model.num_classes": 7}), run_dir) is True
    assert runs.open_run(tiny_config({"model.num_classes": 9}), run_dir) is True  # nothing is lost yet
    assert runs.open_run(tiny_config({"model.num_classes": 7}), run_dir) is True
    write_checkpoint(run_dir / "checkpoints" / "last.pt", {})
    with pytest.raises(RunError, match=r"train\.ema was 0\.0, now 0\.5; train\.seed was 42, now 1"):
        runs.open_run(tiny_config({"train.seed": 1, "train.ema": 0.5}), run_dir)
    with pytest.raises(RunError, match=r"model\.num_classes was 7, now 9"):
        runs.open_run(tiny_config({"model.num_classes": 9}), run_dir)
    write_json(run_dir / "results.json", {})
    with pytest.raises(RunError, match="is finished and is not overwritten"):
        runs.open_run(cfg, run_dir)


def test_a_run_that_would_start_from_itself_is_refused(tmp_path, tiny_config):
    cfg, run_dir = tiny_config({"train.start": str(tmp_path / "own")}), tmp_path / "own"
    run_dir.mkdir()
    with pytest.raises(ConfigError, match=r"train\.start"):
        runs.refuse_run(cfg, run_dir)
    assert runs.refuse_run(cfg, tmp_path / "other") is False


def test_a_run_does_not_go_on_where_nothing_tells_with_which_settings_it_began(tmp_path, tiny_config):
    cfg = tiny_config()
    runs.open_run(cfg, tmp_path)
    write_checkpoint(tmp_path / "checkpoints" / "last.pt", {})
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(RunError, match=r"config\.yaml is empty"):
        runs.refuse_run(cfg, tmp_path)
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(RunError, match=r"has no config\.yaml"):
        runs.refuse_run(cfg, tmp_path)


def test_the_job_of_slurm_is_known(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    assert runs.environment()["slurm"] is None
    monkeypatch.setenv("SLURM_JOB_ID", "15")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[1-2]")
    assert runs.slurm_job() == {"job": "15", "array_task": None, "node": "node[1-2]", "restarts": 0}
    for name, value in {"ARRAY_JOB_ID": "12", "ARRAY_TASK_ID": "3", "RESTART_COUNT": "2"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert runs.environment()["slurm"] == {"job": "12", "array_task": 3, "node": "node[1-2]", "restarts": 2}


@pytest.fixture
def begun(tmp_path, write_layout, tiny_config):
    """`begun(layout)`: a run with a checkpoint on data in a folder; returns its folder and `settings(root)`."""

    def begin(layout="coco", **overrides):
        root = write_layout(tmp_path / "here", layout)

        def settings(root, **changed):
            data = {"data.root": str(root)}
            return tiny_config(data | {name.replace("__", "."): value for name, value in (overrides | changed).items()})

        run_dir, cfg = tmp_path / "run", settings(root)
        runs.open_run(cfg, run_dir, describe_data(cfg.data))
        write_checkpoint(run_dir / "checkpoints" / "last.pt", {})
        return run_dir, settings

    return begin


@pytest.mark.parametrize("layout", ["coco", "roboflow", "yolo", "voc"])
def test_the_same_data_under_another_path_resume(begun, tmp_path, layout):
    run_dir, settings = begun(layout)
    shutil.move(tmp_path / "here", tmp_path / "there")
    cfg = settings(tmp_path / "there")
    assert runs.open_run(cfg, run_dir) is True  # opens the data, as a launcher of several processes must
    assert runs.open_run(cfg, run_dir, describe_data(cfg.data)) is True
    assert load_config(run_dir / "config.yaml") == cfg  # where they are found from now on
    with pytest.raises(RunError, match=r"train\.seed was 42, now 1\)"):
        runs.open_run(settings(tmp_path / "there", train__seed=1), run_dir)


def test_other_data_are_refused_by_what_differs(begun, tmp_path):
    run_dir, settings = begun()
    known = (run_dir / "config.yaml").read_bytes()
    path = shutil.copytree(tmp_path / "here", tmp_path / "there") / "annotations" / "instances_train2017.json"
    original = json.loads(path.read_text())
    changed = json.loads(path.read_text())
    for change, words in [
        (lambda: changed["annotations"][0].update(bbox=[4, 6, 20, 17]), r"\(train digest: \w+, now \w+\)"),
        (lambda: changed["annotations"].pop(), r"\(train objects: 3, now 2; train digest: \w+, now \w+\)"),
        (lambda: changed["categories"][0].update(name="lynx"), r"train classes: cat, dog, now lynx, dog"),
        (lambda: changed["images"].pop(), r"train images: 4, now 3"),
    ]:
        change()
        path.write_text(json.dumps(changed))
        with pytest.raises(RunError, match=rf"run was begun with other data .*{words}"):
            runs.open_run(settings(tmp_path / "there"), run_dir)
    assert (run_dir / "config.yaml").read_bytes() == known
    here = tmp_path / "here" / "annotations" / "instances_train2017.json"
    here.write_text(json.dumps(changed))  # under the same path, too
    cfg = settings(tmp_path / "here")
    with pytest.raises(RunError, match=r"other data .*train images: 4, now 3"):
        runs.open_run(cfg, run_dir, describe_data(cfg.data))
    here.write_text(json.dumps(original))
    assert runs.open_run(cfg, run_dir, describe_data(cfg.data)) is True


def test_a_run_that_is_older_than_that_is_told_apart_by_path(begun, tmp_path):
    run_dir, settings = begun()
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    (run_dir / "data.json").write_text("{}")
    with pytest.raises(RunError, match=r"data\.json is damaged .*delete it"):
        runs.open_run(settings(tmp_path / "there"), run_dir)
    (run_dir / "data.json").unlink()
    with pytest.raises(RunError, match=r"other settings \(data\.root was .*here, now .*there"):
        runs.open_run(settings(tmp_path / "there"), run_dir)
    assert runs.open_run(settings(tmp_path / "here"), run_dir) is True


def test_images_held_out_are_recorded(begun):
    run_dir, settings = begun(data__holdout=0.4)
    recorded = json.loads((run_dir / "data.json").read_text())
    cfg = load_config(run_dir / "config.yaml")
    assert recorded["held_out"] == build_dataset(cfg.data, "val").file_names != []
    with pytest.raises(RunError, match=r"data\.holdout was 0\.4, now 0\.2"):
        runs.open_run(settings(cfg.data.root, data__holdout=0.2), run_dir)
