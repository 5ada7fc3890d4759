"""What this machine lends: cores, and a place for what is made once."""

import os
from pathlib import Path


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_folder() -> Path:
    """Where things made once are kept: $DETRLIB_CACHE, else $XDG_CACHE_HOME/detrlib, else ~/.cache/detrlib."""
    if named := os.environ.get("DETRLIB_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "detrlib"
