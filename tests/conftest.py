"""Settings every test shares, made before torch or detrlib is imported; child processes inherit them."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", str(min(4, os.cpu_count() or 1)))  # tiny tensors gain nothing from more
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["MPLBACKEND"] = "Agg"
os.environ["WANDB_MODE"] = "disabled"
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_configure(config):
    """A cache of this session's own, so that no test reads what an older version of the code has drawn."""
    if "DETRLIB_CACHE" not in os.environ:
        config._detrlib_cache = os.environ["DETRLIB_CACHE"] = tempfile.mkdtemp(prefix="detrlib-tests-")


def pytest_unconfigure(config):
    """Remove the session's cache, and leave one that was given alone."""
    if hasattr(config, "_detrlib_cache"):
        shutil.rmtree(config._detrlib_cache, ignore_errors=True)
        del os.environ["DETRLIB_CACHE"]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real photographs next to the checkout; a test that needs it is skipped where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the real sample data (shared/data next to the checkout) is not on this machine")
    return SHARED_DATA
