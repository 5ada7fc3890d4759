"""The commands, each a function whose signature is its options and which calls one function of the library.

    training    train, check, sweep, notebook
    measuring   evaluate, explain, intervene, figures, huggingface
    using       predict, import, export
    tools       costs, benchmark, unrel

Heavy imports wait until a command is run, so that help is fast. What several of them share is here.
"""

from typing import Annotated, Any, Literal

from typer import Argument, Option

from detrlib.errors import ConfigError

Site = Literal["encoder_self", "decoder_self", "decoder_cross"]
MapSite = Literal["decoder_cross", "encoder_self"]  # whose keys are cells of the picture
MOST_PIXELS = 2**14  # of a side, as of data.image_size
RunName = Annotated[str, Argument(metavar="RUN", help="folder under papermill_runs/")]
Settings = Annotated[list[str], Option("--set", metavar="A.B=C...", help="settings, such as train.epochs=2")]
Gpus = Annotated[int | None, Option(min=0, help="how many; default: one if there is one")]
Processes = Annotated[int, Option(min=1, help="on the CPU, how many")]
Checkpoint = Annotated[str, Option(help="last, best, epoch-NNNN, or untrained")]


def pairs(items: list[str], option: str, example: str) -> dict[str, str]:
    """["a=1", ...] as a dictionary. Raises ConfigError naming the option."""
    if malformed := [item for item in items if not item.partition("=")[1]]:
        raise ConfigError(f"{option} {malformed[0]}: expected name=value, e.g. {example}")
    return dict(item.split("=", 1) for item in items)


def values_in(text: str | None, option: str, kind: type = str) -> list[Any]:
    """ "1,1.5,2" as a list. Raises ConfigError naming the option."""
    try:
        values = [] if text is None else [kind(part.strip()) for part in text.split(",")]
    except ValueError:
        values = [""]
    if "" in values:
        raise ConfigError(f"{option} {text!r}: expected values between commas, e.g. 1,1.5,2")
    return values


def in_words(numbers: dict[str, float]) -> str:
    """Numbers of COCO in a line, undefined ones as a dash."""
    return "  ".join(f"{name} {f'{value:.3f}' if value >= 0 else '–'}" for name, value in numbers.items())
