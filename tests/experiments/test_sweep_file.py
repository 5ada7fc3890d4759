"""What a sweep file asks for, and files that are none."""

import pytest

from detrlib.errors import ConfigError
from detrlib.experiments.sweep_file import read_sweep


def test_a_sweep_is_a_config_for_every_run(sweep_file, tiny_config):
    configs, *parameters = read_sweep(sweep_file())
    assert parameters == [{}, {}, None] and set(configs) == {"one", "two", "three"}
    assert [configs[name].train.epochs for name in ("one", "two", "three")] == [1, 3, 1]
    assert configs["three"].train.seed == 3 and configs["two"].train.lr == 5e-4
    assert configs["one"].model.hidden_dim == tiny_config().model.hidden_dim


def test_what_a_run_says_counts_more_than_what_all_say(sweep_file):
    runs = {"one": {"train.lr": 1e-3}, "two": {"train": {"lr": 1e-2}}, "three": None}
    configs = read_sweep(sweep_file(overrides={"train": {"lr": 1e-4}}, runs=runs)).configs
    assert [configs[name].train.lr for name in runs] == [1e-3, 1e-2, 1e-4], "however it is spelt"


def test_a_sweep_over_seeds_repeats_every_run(sweep_file):
    runs = {"one": None, "two": {"train.epochs": 3}, "three": {"train.start": "many/one-seed{seed}"}}
    asked = {"measure": {"num_examples": 2}, "report": {"pairs": [["two", "one"]]}}
    configs, measure, report, _ = read_sweep(sweep_file(seeds=[4, 5], runs=runs, **asked))
    assert configs["three-seed5"].train.start == "many/one-seed5"
    assert set(configs) == {f"{name}-seed{seed}" for name in ("one", "two", "three") for seed in (4, 5)}
    assert [cfg.train.seed for cfg in configs.values()] == [4, 4, 4, 5, 5, 5]
    assert configs["two-seed5"].train.epochs == 3
    assert {"measure": measure, "report": report} == asked
    path = sweep_file(seeds=[1], runs={"one": {"seeds": [2, 1], "train.epochs": 2}, "two": None})
    assert list(read_sweep(path).configs) == ["one-seed2", "one-seed1", "two-seed1"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seeds": "3"}, r"many\.yaml: seeds"),
        ({"seeds": ["a"]}, r"many\.yaml: seeds"),
        ({"seeds": [1, 1]}, r"many\.yaml: seeds is \[1, 1\]"),
        ({"seeds": [-1]}, r"many\.yaml: seeds"),
        ({"seeds": [True]}, r"many\.yaml: seeds"),
        ({"report": {1: 1}}, r"many\.yaml: report: .*'1'"),
        ({"report": {"pairs": [[["one"], ["one"]]]}}, r"many\.yaml: report: pairs"),
        ({"runs": {"one": {"seeds": [1]}, "one-seed1": None}}, r"many\.yaml: runs: .*one-seed1"),
        ({"folder": "both", "runs": {"many": None}}, r"many\.yaml: runs: many"),
        *(
            ({"runs": {name: None}}, r"many\.yaml: runs: ")
            for name in ("../../x", "/tmp/x", ".", "", " ", "a/b", "a\nb", "figures", "log.txt", "a" * 300)
        ),
        ({"measure": {"num_example": 2}}, r"many\.yaml: measure: .*'num_example'.*'num_examples'"),
        ({"measure": 3}, r"many\.yaml: measure"),
        ({"report": {"resample": 2}}, r"many\.yaml: report: .*'resample'.*'resamples'"),
        ({"runs": {"one": {"seeds": 3}}}, r"many\.yaml: runs: one: seeds"),
        ({"report": {"pairs": [["one", "too"]]}}, r"many\.yaml: report: pairs: .*'too'"),
        ({"report": {"pairs": ["one"]}}, r"many\.yaml: report: pairs: 'one'"),
        ({"folder": 3}, r"many\.yaml: folder"),
        ({"overrides": 3}, r"many\.yaml: overrides"),
        ({"base": None}, r"many\.yaml: base"),
        ({"base": 3}, r"many\.yaml: base"),
        ({"runs": None}, r"many\.yaml: runs"),
        ({"runs": ["one"]}, r"many\.yaml: runs"),
        ({"runs": {}}, r"many\.yaml: runs"),
        ({"runs": {1: None}}, r"many\.yaml: runs: 1"),
        ({"runs": {"one": 3}}, r"many\.yaml: runs: 'one'"),
        ({"override": {}}, r"many\.yaml: unknown override"),
        ({"base": "bass.yaml"}, r"bass\.yaml.*base\.yaml"),
        ({"runs": {"one": {"train": {"lr": 1e-4}, "train.lr": 1e-3}}}, r"many\.yaml: runs: one: train\.lr is given"),
        ({"overrides": {"train": {"lr": 1e-4}, "train.lr": 1e-3}}, r"many\.yaml: overrides: train\.lr is given"),
        ({"runs": {"one": {"train.epoch": 3}}}, r"many\.yaml: runs: one: .*'train\.epoch'.*'train\.epochs'"),
        ({"runs": {"one": None, "two": {"train.lr": -1}}}, r"many\.yaml: runs: two: .*train\.lr"),
    ],
)
def test_a_sweep_file_that_is_none(sweep_file, changes, message):
    with pytest.raises(ConfigError, match=message):
        read_sweep(sweep_file(**changes))
