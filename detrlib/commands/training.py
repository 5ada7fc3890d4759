"""Train: one run, several, in a notebook; and look over what it is trained on."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from detrlib.commands import Gpus, Processes, Settings, in_words, pairs
from detrlib.errors import ConfigError, is_main_process


def train(
    config: Annotated[Path, Argument(help="YAML file, e.g. papermill_runs/configs/shapes.yaml")],
    name: Annotated[str, Option(help="folder under papermill_runs/; the same name resumes an unfinished run")],
    settings: Settings = [],  # noqa: B006, never changed
    gpus: Gpus = None,
    processes: Processes = 1,
    job: Annotated[bool, Option("--job", hidden=True, help="in a job of Slurm, see slurm.sh")] = False,
) -> None:
    """Train a model, here or in several processes."""
    from detrlib.config import load_config
    from detrlib.engine.launch import launch
    from detrlib.experiments.cluster import train_in_job
    from detrlib.figures.viewer import refresh_viewers
    from detrlib.runs.folder import run_path

    cfg = load_config(config, pairs(settings, "--set", "train.epochs=2"))
    results = train_in_job(cfg, run_path(name)) if job else launch(cfg, run_path(name), gpus, processes)
    numbers, floor = results.get("detection", {}), results.get("floor")  # none of what was imported and never measured
    known = floor and floor["AP"] >= 0
    beside = f"  (floor {floor['AP']:.3f}, {floor['AP50']:.3f})" if known else ""
    typer.echo(f"{in_words({cut: numbers[cut] for cut in ('AP', 'AP50') if cut in numbers})}{beside}  {run_path(name)}")
    for path in refresh_viewers(run_path(name)) if is_main_process() else ():
        typer.echo(f"to look through in a browser: {path}")


def check(
    config: Annotated[Path, Argument(help="YAML file; its section data says where the pictures are")],
    settings: Settings = [],  # noqa: B006
) -> None:
    """Look over the data of a config: decode every picture once, compare the splits, say what is unusual."""
    from detrlib.config import load_config
    from detrlib.data import look_over, open_splits

    cfg = load_config(config, pairs(settings, "--set", "data.root=/data/mine"))
    found = look_over(open_splits(cfg.data), cfg.model.num_queries, cfg.data.check)
    typer.echo("\n".join([*found.lines, found.counts.to_string()]))


def sweep(
    context: typer.Context,
    path: Annotated[Path, Argument(help="sweep file, e.g. papermill_runs/configs/quickstart.yaml")],
    name: Annotated[str | None, Option(help="folder under papermill_runs/; default: as the file is or says")] = None,
    parallel: Annotated[int | None, Option(min=1, help="runs side by side; default: one per GPU or core")] = None,
    slurm: Annotated[bool, Option("--slurm", help="submit what is missing; options of sbatch follow FILE")] = False,
    show: Annotated[bool, Option("--list", help="number, name and state of every run")] = False,
    number: Annotated[int | None, Option("--run", min=1, help="train and measure this one, by its number")] = None,
    draw: Annotated[bool, Option("--draw", help="the report alone, once all runs are done")] = False,
) -> None:
    """Train and measure several variants of one experiment, and draw what they show together."""
    from detrlib.experiments import cluster
    from detrlib.experiments.sweep import sweep as run_sweep
    from detrlib.runs.folder import run_path

    folder = None if name is None else run_path(name)
    if slurm + show + draw + (number is not None) > 1:
        raise ConfigError("--slurm, --list, --run and --draw: give one of them")
    if context.args and not slurm:
        raise ConfigError(f"{context.args[0]}: not an option of sweep; those of sbatch need --slurm")
    if slurm:
        typer.echo("\n".join(cluster.submit(path, folder, context.args, parallel)))
    elif show:
        typer.echo("\n".join(cluster.describe(path, folder)))
    elif draw or number:
        typer.echo(cluster.draw(path, folder) if draw else cluster.run_one(path, number, folder))
    else:
        typer.echo(run_sweep(path, folder, parallel))


def sweep_run(folder: Path) -> None:
    """One run of a sweep in a process of its own."""
    from detrlib.engine.children import follow
    from detrlib.engine.notebooks import execute_asked

    follow()
    execute_asked(folder)


def notebook(
    name: Annotated[str, Argument(help="such as 07_evaluate, or evaluate")],
    output: Annotated[Path, Argument(help="where the executed copy goes")],
    parameters: Annotated[list[str], Option("-p", metavar="NAME=VALUE...", help="parameters")] = [],  # noqa: B006
) -> None:
    """Execute a notebook headless; its parameters are checked before anything runs."""
    from detrlib.engine.notebooks import execute_notebook
    from detrlib.experiments.cluster import getting_further
    from detrlib.runs.folder import run_path
    from detrlib.runs.owner import owned

    values = pairs(parameters, "-p", "run_name=first")
    run = values.get("run_name")
    with owned(run_path(run)) if run else nullcontext(), getting_further(run_path(run) if run else output.parent):
        typer.echo(execute_notebook(name, output, values, progress=True))  # whose copy nobody else writes either
