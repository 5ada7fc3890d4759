"""Settings: what wins over what, what is refused, and what the message says."""

from pathlib import Path

import pytest

from detrlib.config import (
    PROJECT,
    Config,
    flat_settings,
    known_settings,
    load_config,
    project_path,
    replace,
    save_config,
)
from detrlib.errors import ConfigError


@pytest.fixture
def write(tmp_path):
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


def test_no_file_gives_the_defaults():
    assert load_config() == Config()


def test_an_empty_file_gives_the_defaults(write):
    assert load_config(write("empty.yaml", "# nothing yet\n")) == Config()


def test_precedence_is_defaults_base_file_overrides(write):
    write("base.yaml", "train: {epochs: 10, batch_size: 2, lr_drop: 7, seed: 1}")
    path = write("file.yaml", "base: base.yaml\ntrain: {epochs: 20, batch_size: 4}")
    train = load_config(path, {"train.epochs": 30}).train
    assert (train.epochs, train.batch_size, train.lr_drop) == (30, 4, 7)
    assert train.lr == Config().train.lr


def test_a_file_changes_only_what_it_names_in_a_nested_section(write):
    write("base.yaml", "model: {backbone: {name: tiny, weights: none}, num_heads: 4}")
    model = load_config(write("file.yaml", "base: base.yaml\nmodel: {backbone: {weights: crops}}")).model
    assert (model.backbone.name, model.backbone.weights, model.num_heads) == ("tiny", "crops", 4)


def test_bases_chain_and_are_found_from_the_file_that_names_them(write):
    write("a/root.yaml", "train: {epochs: 1, seed: 1}\ndata: {augment: none}")
    write("a/middle.yaml", "base: root.yaml\ntrain: {epochs: 2}")
    cfg = load_config(write("b/leaf.yaml", "base: ../a/middle.yaml\ntrain: {seed: 3}"))
    assert (cfg.train.epochs, cfg.train.seed, cfg.data.augment) == (2, 3, "none")


def test_a_base_is_no_setting_of_the_result(write):
    write("base.yaml", "train: {epochs: 1}")
    assert "base" not in load_config(write("file.yaml", "base: base.yaml")).model_dump()


@pytest.mark.parametrize("bases", [{"a.yaml": "a.yaml"}, {"a.yaml": "b.yaml", "b.yaml": "a.yaml"}])
def test_a_cycle_of_bases_is_named_not_followed(write, bases):
    paths = [write(name, f"base: {base}") for name, base in bases.items()]
    with pytest.raises(ConfigError, match=r"a\.yaml.*'base' refers back to itself"):
        load_config(paths[0])


def test_a_missing_file_suggests_a_near_one(write):
    path = write("entmax15.yaml", "")
    with pytest.raises(ConfigError, match=r"entmax51\.yaml: no such config file; did you mean entmax15\.yaml"):
        load_config(path.with_name("entmax51.yaml"))


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.e-4", "1.0e-4", ".1e-3", "0.0001"])
def test_every_spelling_of_a_small_number_is_a_float(write, text):
    from_file = load_config(write("lr.yaml", f"train: {{lr: {text}}}")).train.lr
    from_override = load_config(overrides={"train.lr": text}).train.lr
    assert isinstance(from_file, float) and from_file == from_override == 1e-4


def test_overrides_given_as_text_are_read_as_yaml():
    overrides = {"train.epochs": "2", "data.strict": "true", "data.val_limit": "null", "train.tracking.group": "a b"}
    cfg = load_config(overrides=overrides)
    assert (cfg.train.epochs, cfg.data.strict, cfg.data.val_limit, cfg.train.tracking.group) == (2, True, None, "a b")


@pytest.mark.parametrize(
    ("text", "unknown", "suggestion"),
    [
        ("train: {epoch: 2}", "train.epoch", "train.epochs"),
        ("model: {attention: {decoder_cros: entmax15}}", "model.attention.decoder_cros", "decoder_cross"),
        ("trian: {epochs: 2}", "trian.epochs", "train.epochs"),
        ("lr: 1e-3", "lr", "train.lr"),
    ],
)
def test_an_unknown_key_in_a_file_names_file_key_and_nearest_setting(write, text, unknown, suggestion):
    with pytest.raises(ConfigError) as error:
        load_config(write("wrong.yaml", text))
    for part in ("wrong.yaml", f"'{unknown}'", "did you mean", suggestion):
        assert part in str(error.value)


def test_a_base_that_is_no_name_of_a_file_is_named(write):
    with pytest.raises(ConfigError, match=r"file\.yaml: base"):
        load_config(write("file.yaml", "base: 3"))


def test_an_unknown_key_in_a_base_names_the_base(write):
    write("base.yaml", "train: {epoch: 2}")
    with pytest.raises(ConfigError, match=r"base\.yaml: unknown setting 'train\.epoch'"):
        load_config(write("file.yaml", "base: base.yaml"))


def test_an_unknown_override_names_the_nearest_setting():
    with pytest.raises(ConfigError, match=r"override: unknown setting 'train\.epoch'; did you mean 'train\.epochs'"):
        load_config(overrides={"train.epoch": 2})
    with pytest.raises(ConfigError, match=r"did you mean 'model\.num_heads'"):
        replace(Config(), {"model.num_head": 2})


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("train.epochs", "many"),
        ("train.epochs", 0),
        ("train.epochs", 1.5),
        ("train.lr", -1.0),
        ("data.strict", "perhaps"),
        ("model.norm", "middle"),
        ("model.attention.encoder_self", "entmax51"),
        ("model.backbone", "resnet50"),
        ("model.dropout", 1.0),
        ("loss.weight_bbox", -1),
        ("loss.cost_giou", ".nan"),
        ("train.lr", ".inf"),
        ("train.clip_norm", ".inf"),
        ("train.micro_batch", True),
        ("model.attention.tv_lambda", True),
        ("train.seed", -1),
        ("data.root", ""),
        ("data.classes", [None, " "]),
        ("data.classes", [["a"] * 10] * 10),
        ("train", [1, 2]),
        ("model.num_classes", 2 * 10**9),
        ("model.hidden_dim", 2 * 10**9),
        ("model.encoder_layers", 10**9),
        ("data.image_size", 2 * 10**9),
        ("data.shapes.train", 2 * 10**9),
        ("train.epoch_updates", 2 * 10**9),
    ],
)
def test_a_wrong_value_is_refused_and_the_message_names_the_setting(setting, value):
    with pytest.raises(ConfigError) as error:
        load_config(overrides={setting: value})
    assert setting in str(error.value) and len(str(error.value)) < 400


def test_ids_with_gaps_are_what_too_many_classes_may_mean():
    with pytest.raises(ConfigError, match=r"model\.num_classes.*data\.contiguous"):
        load_config(overrides={"model.num_classes": 2 * 10**9})


def test_a_setting_is_given_once(write):
    with pytest.raises(ConfigError, match=r"twice\.yaml: train\.lr"):
        load_config(write("twice.yaml", "train: {lr: 1e-4}\ntrain.lr: 1e-3"))
    assert load_config(overrides={"train.lr": 1e-4, "train": {"lr": 1e-3}}).train.lr == 1e-3, "the later one"
    assert load_config(overrides={"train": {"lr": 1e-3}, "train.lr": 1e-4}).train.lr == 1e-4


def test_a_wrong_choice_suggests_the_nearest_one():
    with pytest.raises(ConfigError, match="did you mean 'entmax15'"):
        load_config(overrides={"model.attention.encoder_self": "entmax51"})
    with pytest.raises(ConfigError, match=r"data\.check") as error:
        load_config(overrides={"data.check": "no"})  # which YAML reads as false
    assert "did you mean" not in str(error.value)


DEFORMABLE = {"model.architecture": "deformable"}
TWO_STAGE = DEFORMABLE | {"model.deformable.refine": True, "model.deformable.two_stage": True}


def test_a_file_of_another_architecture_takes_over_what_both_know(write):
    write(
        "detr.yaml",
        "model: {norm: pre, queries: anchor, num_heads: 4, attention: {decoder_cross: entmax15, alpha: 1.2}}",
    )
    path = write("deformable.yaml", "base: detr.yaml\nmodel: {architecture: deformable, deformable: {levels: 2}}")
    model = load_config(path).model
    assert (model.num_heads, model.attention.alpha, model.deformable.levels) == (4, 1.2, 2)
    assert load_config(path, {"model.architecture": "detr"}).model.norm == "post"


def test_settings_that_have_moved_are_found_under_their_old_names(write):
    old = "model: {backbone: {mask_padding: false}, attention: {padding: add_one, alpha_clamped: true}}"
    compatibility = load_config(write("old.yaml", old)).model.compatibility
    assert compatibility.model_dump() == {"padding": "thesis", "alpha_clamped": True}
    for old, new in [
        ({"mask_padding": True, "attention_padding": "hidden"}, "exact"),
        ({"mask_padding": False, "attention_padding": "hidden"}, "official"),
        ({"attention_padding": "add_one", "mask_padding": False}, "thesis"),
    ]:
        assert load_config(overrides={"model.compatibility": old}).model.compatibility.padding == new
    for old, new in [((True, "masked"), "exact"), ((False, "masked"), "official"), ((True, "official"), "official")]:
        old = dict(zip(("mask_padding", "token_scores"), old, strict=True))
        overrides = DEFORMABLE | {"model.compatibility": old}
        assert load_config(overrides=overrides).model.compatibility.padding == new
    with pytest.raises(ConfigError, match=r"model\.compatibility\.padding.*'sometimes'"):
        load_config(overrides={"model.backbone.mask_padding": "sometimes"})
    sparse = load_config(overrides=DEFORMABLE | {"model.deformable.dam": "official"}).model
    assert sparse.compatibility.dam == "official"


def test_a_model_that_is_gone_is_named_with_what_to_do_instead():
    with pytest.raises(ConfigError, match=r"model\.architecture faster_rcnn.*--predictions"):
        load_config(overrides={"model.architecture": "faster_rcnn"})


@pytest.mark.parametrize("text", ["- 1\n- 2", "just words", "train: {epochs: 2"])
def test_what_is_not_a_mapping_is_refused(write, text):
    with pytest.raises(ConfigError, match=r"wrong\.yaml"):
        load_config(write("wrong.yaml", text))


def test_a_section_given_as_a_plain_value_is_refused(write):
    with pytest.raises(ConfigError, match="train"):
        load_config(write("wrong.yaml", "train: 3"))


def test_an_override_below_a_plain_value_is_refused():
    with pytest.raises(ConfigError):
        load_config(overrides={"train.epochs.more": 1})


def test_replace_gives_a_checked_copy_and_leaves_the_original():
    cfg = Config()
    assert replace(cfg, {"train.epochs": 2}).train.epochs == 2
    assert cfg == Config()
    with pytest.raises(ConfigError, match=r"train\.epochs"):
        replace(cfg, {"train.epochs": -2})


def test_saved_settings_load_to_the_same_settings(tmp_path):
    overrides = {"train.lr": 3e-7, "train.lr_alpha": 0.0, "data.train_limit": 5, "model.attention.alpha_init": "normal"}
    cfg = load_config(overrides=overrides)
    save_config(cfg, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == cfg
    assert "lr_backbone" in (tmp_path / "config.yaml").read_text()  # defaults included


def test_relative_paths_start_at_the_project_root_whatever_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert project_path("papermill_runs/configs") == PROJECT / "papermill_runs" / "configs"
    assert project_path(tmp_path) == tmp_path
    assert (PROJECT / "pyproject.toml").is_file()


def test_a_relative_config_path_is_found_from_any_working_directory(write, tmp_path, monkeypatch):
    write("project/configs/short.yaml", "train: {epochs: 3}")
    monkeypatch.setattr("detrlib.config.load.PROJECT", tmp_path / "project")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_config("configs/short.yaml").train.epochs == 3


@pytest.mark.parametrize("overrides", [{}, DEFORMABLE])
def test_every_known_setting_can_be_overridden_with_its_own_value(overrides):
    cfg = load_config(overrides=overrides)
    for name, value in flat_settings(cfg).items():
        assert load_config(overrides=overrides | {name: value}) == cfg, name
        assert name in known_settings()


def test_the_parameter_of_the_published_tvmax_is_halved(tmp_path):
    cfg = load_config(overrides={"model.attention.tv_alpha": "0.1"})
    assert cfg == load_config(overrides={"model.attention.tv_lambda": 0.05})
    path = tmp_path / "saved.yaml"
    save_config(cfg, path)
    assert load_config(path) == cfg  # as tv_lambda
    assert replace(cfg, {"model.attention.tv_alpha": 1}).model.attention.tv_lambda == 0.5  # over what it stands for


@pytest.mark.parametrize(
    "overrides",
    [
        {"model.attention.tv_alpha": 0.1, "model.attention.tv_lambda": 0.05},
        {"model.attention.tv_alpha": "strong"},
        {"model.attention.tv_alpha": -0.1},
        {"model.attention.tv_alpha": 0.1, "model.architecture": "deformable"},
    ],
)
def test_the_parameter_of_the_published_tvmax_is_refused_beside_ours_and_where_there_is_none(overrides):
    with pytest.raises(ConfigError, match=r"model\.attention\.tv_"):
        load_config(overrides=overrides)


def test_a_sweep_is_no_config():
    with pytest.raises(ConfigError, match="detrlib sweep"):
        load_config("papermill_runs/configs/quickstart.yaml")


@pytest.mark.parametrize("old", ["mask_padding", "attention_padding", "token_scores"])
def test_an_older_name_beside_the_one_of_today_is_refused(old):
    overrides = {"model.compatibility.padding": "official", f"model.compatibility.{old}": True}
    with pytest.raises(ConfigError, match=rf"model\.compatibility\.{old} .*model\.compatibility\.padding"):
        load_config(overrides=overrides)
