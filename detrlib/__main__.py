"""The command line: `detrlib COMMAND`, or `python -m detrlib COMMAND`.

A fault that can be foreseen is one line on standard error and exit code 1, an interruption is 130, and a training that
a signal has stopped, to be started again, 75.
"""

import io
import os
from contextlib import redirect_stdout
from typing import Annotated

import typer
from typer import Option

from detrlib import errors
from detrlib.commands import measuring, tools, training, using
from detrlib.errors import STOPPED, ConfigError, Stopped, fault_of, show_messages

COMMANDS = {  # as help lists them
    "train": training.train,
    "check": training.check,
    "evaluate": measuring.evaluate,
    "predict": using.predict,
    "explain": measuring.explain,
    "intervene": measuring.intervene,
    "figures": measuring.figures,
    "sweep": training.sweep,
    "notebook": training.notebook,
    "import": using.import_weights,
    "export": using.export,
    "huggingface": measuring.huggingface,
    "costs": tools.costs,
    "benchmark": tools.benchmark,
    "unrel": tools.unrel,
}
WITH_MORE = {"sweep": {"allow_extra_args": True, "ignore_unknown_options": True}}  # options of sbatch
PAIRS = ("--set", "--map", "-p")  # options that take NAME=VALUE, once or several times


class Commands(typer.core.TyperGroup):
    """Commands whose foreseeable faults are one line."""

    def resolve_command(self, ctx, args):
        """The command that was asked for, and its arguments."""
        return super().resolve_command(ctx, repeated(args))

    def invoke(self, ctx):
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except Stopped as stopped:
            typer.echo(stopped, err=True)
            raise typer.Exit(STOPPED) from None
        except Exception as error:
            if not (fault := fault_of(error)):
                raise
            typer.echo(f"error: {fault}", err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            typer.echo("interrupted; the same command continues where it can", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Sparse attention in detection transformers: train, measure, explain and change detectors.",
)


def repeated(words: list[str]) -> list[str]:
    """`--set a=1 b=2` as `--set a=1 --set b=2`: what follows a pair and has an equals sign is one too.

    Raises ConfigError for `-p name value`, as other programs have it.
    """
    result, option, first = [], None, False
    for word, following in zip(words, [*words[1:], "-"], strict=True):
        if first and "=" not in word and not following.startswith("-"):
            raise ConfigError(f"{option} {word} {following}: expected name=value, such as {option} {word}={following}")
        if option and not first and ("=" not in word or word.startswith("-")):
            option = None
        result += [word] if first or not option else [option, word]
        option, first = (word, True) if word in PAIRS and not first else (option, False)
    return result


@app.callback()
def messages(
    ctx: typer.Context,
    take_over: Annotated[bool, Option("--take-over", help="runs whose owner, on another machine, is gone")] = False,
) -> None:
    """Sparse attention in detection transformers: train, measure, explain and change detectors."""
    show_messages()
    if take_over:
        os.environ["DETRLIB_TAKE_OVER"] = "1"  # see `runs.owner`; also for what is started from here
    if not errors.is_main_process():
        ctx.with_resource(redirect_stdout(io.StringIO()))


for name, command in COMMANDS.items():
    app.command(name, context_settings=WITH_MORE.get(name))(command)
app.command("sweep-run", hidden=True)(training.sweep_run)


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
