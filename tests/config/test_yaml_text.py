"""What stands in a YAML file is meant as it stands, or the file is refused by its name, in one line."""

import pytest

from detrlib.config import load_config, parse_value, read_yaml
from detrlib.errors import ConfigError


def test_a_mark_of_byte_order_is_no_part_of_the_text(tmp_path):
    (tmp_path / "windows.yaml").write_bytes(b"\xef\xbb\xbftrain: {epochs: 2}")
    assert read_yaml(tmp_path / "windows.yaml") == {"train": {"epochs": 2}}


def test_an_alias_stands_for_its_part_and_what_is_merged_may_be_given_anew(tmp_path):
    (tmp_path / "merged.yaml").write_text("a: &a {x: 1, y: [2]}\nb: {<<: *a, x: 3}\nc: *a")
    assert read_yaml(tmp_path / "merged.yaml")["b"] == {"x": 3, "y": [2]}


DEEP, DIGITS = 3000, 5000
TRAPS = {
    "another encoding": ("train: {tracking: {project: Müller}}".encode("latin-1"), "UTF-8"),
    "UTF-16": ("train: {epochs: 2}".encode("utf-16"), "UTF-8"),
    "a picture": (b"\x89PNG\r\n\x1a\n\0\0", "UTF-8"),
    "no characters": (b"train: {epochs: \0}", "YAML"),
    "a key twice": (b"train: {epochs: 2}\ntrain: {lr: 1}", "'train' is there twice"),
    "a key twice in a section": (b"train: {lr: 1, lr: 2}", "'lr' is there twice"),
    "a mapping in itself": (b"train: &a {tracking: *a}", "recursive"),
    "a list in itself": (b"train: &a [*a]", "recursive"),
    "brackets without end": (b"train: " + b"[" * DEEP + b"]" * DEEP, "too many"),
    "a number without end": (b"train: {seed: " + b"9" * DIGITS + b"}", "digits"),
    "a day that is none": (b"data: {root: 2024-13-45}", "month"),
    "an object": (b"train: !!python/object/apply:os.getcwd []", "python"),
    "a list": (b"- train", "list"),
}


@pytest.mark.parametrize(("content", "words"), TRAPS.values(), ids=TRAPS)
def test_what_is_no_mapping_of_settings_is_refused_by_name(tmp_path, content, words):
    (tmp_path / "wrong.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=words) as error:
        load_config(tmp_path / "wrong.yaml")
    assert str(error.value).startswith(f"{tmp_path / 'wrong.yaml'}: ") and "\n" not in str(error.value)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ConfigError, match=str(tmp_path)):
        read_yaml(tmp_path)


def test_text_of_overrides_is_read_in_the_same_way():
    assert parse_value("1e-4") == 1e-4 and parse_value("[1, 2]") == [1, 2] and parse_value("a b") == "a b"
    for text in ("[1", "{a: 1, a: 2}", "9" * DIGITS):
        with pytest.raises(ConfigError, match="YAML") as error:
            parse_value(text)
        assert len(str(error.value)) < 400
