"""Speed, memory and accuracy beside other implementations. Nothing else imports it.

measure, synthetic, report     how time and memory are measured, on which numbers, and tables of them
rivals, detectors, published   what is measured against: transforms, training steps, published prices
kernels, training, gpu         all of a GPU in six minutes
step, loader, growth           on a CPU: a training step, images prepared, and how time and memory grow
latency, figures               components of a model; figures of notebook 10

A module here that has a function `main(out: Path) -> None` is a program of `detrlib benchmark`: it prints a table and
writes what it measured into the folder `out`.
"""

import re
from importlib import import_module
from pathlib import Path

from detrlib.errors import ConfigError, listed


def programs() -> list[str]:
    """Names of the modules here that `detrlib benchmark` runs; none of them is imported."""
    files = (path for folder in __path__ for path in Path(folder).glob("*.py"))
    return sorted(path.stem for path in files if re.search(r"^def main\(out", path.read_text(), re.MULTILINE))


def run_program(name: str, out: Path) -> None:
    """Run a program, which writes into the folder `out`.

    Raises:
        ConfigError: there is no such program.
        RunError: `out` cannot be a folder; nothing has been measured yet.
    """
    from detrlib.figures.album import check_folder  # not imported to name the programs

    if name not in programs():
        raise ConfigError(f"benchmark {name}: there is none of that name; there are {listed(programs())}")
    check_folder(out)
    import_module(f"{__name__}.{name}").main(out)
