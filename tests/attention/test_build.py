"""Transforms by name, and what they are told."""

import pytest

from detrlib.attention import TRANSFORMS, build_transform

HEADS = 3


@pytest.mark.parametrize(
    ("settings", "name"), [({"null_key": "one"}, "'one'"), ({"tau": 1.0}, "'tau'"), ({"alpha": "sharp"}, "alpha")]
)
def test_a_wrong_setting_is_named(settings, name):
    with pytest.raises(ValueError, match=name):
        build_transform("softmax", HEADS, **settings)


def test_unknown_transform_names_those_there_are():
    with pytest.raises(ValueError, match="'sparsmax'") as error:
        build_transform("sparsmax", HEADS)
    assert all(name in str(error.value) for name in TRANSFORMS)
