"""What needs no run: the costs of a model, the speed of this machine, another data set's annotations."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Argument, Option

from detrlib.benchmarks import programs, run_program
from detrlib.commands import MOST_PIXELS, Settings, pairs, values_in
from detrlib.errors import ConfigError


def costs(
    config: Annotated[Path, Argument(help="YAML file of a run")],
    settings: Settings = [],  # noqa: B006
    size: Annotated[str, Option(metavar="H,W", help="pixels of the image; default: data.image_size, at 3:4")] = "",
    latency: Annotated[bool, Option("--latency", help="also measure milliseconds")] = False,
    memory: Annotated[
        float | None, Option(metavar="GIB", min=0.01, max=10**6, help="also say how many images train in so much")
    ] = None,
) -> None:
    """Parameters, GFLOPs and time of a model, by component, and the memory that training takes."""
    from detrlib.config import load_config
    from detrlib.experiments.costs import cost_table
    from detrlib.models import build_model

    cfg = load_config(config, {"model.num_classes": 91} | pairs(settings, "--set", "model.norm=pre"))
    short = cfg.data.image_size
    pixels = values_in(size or f"{short},{short * 4 // 3}", "--size", int)
    if len(pixels) != 2 or min(pixels) < 1 or max(pixels) > MOST_PIXELS:
        raise ConfigError(f"--size {size}: expected height and width, 1 to {MOST_PIXELS} pixels, e.g. 800,1066")
    model = build_model(cfg.model, backbone_weights="none")
    table = cost_table({config.stem: model}, tuple(pixels)).drop(columns="model")
    if latency:
        from detrlib.benchmarks.latency import measure_latency

        table["milliseconds"] = table["component"].map(measure_latency(model, tuple(pixels)))
    typer.echo(table.round(2).to_string(index=False))
    if memory is not None:
        from detrlib.engine.memory import training_memory

        typer.echo(training_memory(cfg, tuple(pixels), memory))


def benchmark(
    what: Annotated[str, Argument(metavar="WHAT", help=" | ".join(programs()))],
    out: Annotated[Path, Option(help="folder of the tables and the numbers")] = Path("build/benchmarks"),
) -> None:
    """Measure speed and memory of this machine, beside other implementations."""
    run_program(what, out)


def unrel(
    mat: Annotated[Path, Argument(help="UnRel's annotations.mat")],
    images: Annotated[Path, Argument(help="UnRel's folder of images")],
    out: Annotated[Path, Argument(help="the COCO-format file to write, e.g. beside the folder of images")],
    ids: Annotated[Literal["coco", "thesis"], Option(help="thesis: as published, faults included")] = "coco",
    unmapped: Annotated[Literal["drop", "ignore"], Option(help="names that COCO does not have")] = "drop",
) -> None:
    """UnRel's annotations in COCO format."""
    from detrlib.experiments.unrel import convert_unrel, summary

    typer.echo(summary(out, convert_unrel(mat, images, out, ids, unmapped)))
