"""Figures of the walkthroughs leave nothing behind."""

import pytest


@pytest.fixture(autouse=True)
def nothing_left(leaves_nothing_behind):
    """Of every test of this folder."""
