"""Use models: on pictures of yours, from and for other programs."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Argument, Option

from detrlib.commands import Checkpoint, MapSite, Settings, pairs
from detrlib.errors import ConfigError, DataError


def predict(
    words: Annotated[list[str], Argument(metavar="MODEL... PICTURE...", help="runs or weights; files, folders, globs")],
    out: Annotated[Path, Option(help="folder of the page, the pictures and predictions.json")] = Path("predictions"),
    score: Annotated[float, Option(min=0, max=1, help="of the detections that are kept")] = 0.5,
    attention: Annotated[bool, Option("--attention", help="draw where each detection looks")] = False,
    site: Annotated[MapSite, Option(help="whose maps are drawn")] = "decoder_cross",
    layer: Annotated[int, Option(help="from 0, or from the end")] = -1,
    head: Annotated[str, Option(help="from 0, or mean")] = "mean",
    explanations: Annotated[bool, Option("--explain", help="explain each detection, as explain does")] = False,
    limit: Annotated[int | None, Option(min=1, help="the first pictures only")] = None,
    device: Annotated[str | None, Option(help="cpu or cuda; default: a GPU if there is one")] = None,
    checkpoint: Annotated[str, Option(help="of runs: last, best, epoch-NNNN")] = "last",
    batch_size: Annotated[int, Option(min=1, help="pictures a model sees at a time")] = 4,
) -> None:
    """Show what models detect in pictures of yours, side by side: detrlib predict detr-r50 photo.jpg

    A name is a run, published weights, a file of weights or an id of Hugging Face; what exists as a picture, a folder
    of pictures, a pattern or a JSON list of images in COCO's format is taken for pictures.
    """
    from detrlib.data.pictures import find_pictures, readable, unreadable
    from detrlib.engine import predict as engine
    from detrlib.experiments.explain import explained_each
    from detrlib.figures.album import Album, check_folder
    from detrlib.figures.predictions import MapChoice

    if head != "mean" and not head.isdecimal():
        raise ConfigError(f"--head {head}: expected a number from 0, or mean")
    view = MapChoice(site, layer, "mean" if head == "mean" else int(head))
    drawn = attention or view != MapChoice()
    models, named = engine.models_and_pictures(words)
    pictures, left_out = readable(find_pictures(named, limit))
    check_folder(out)
    detectors = engine.open_detectors(models, device, checkpoint)
    sites = tuple({"decoder_cross", view.site}) if drawn or explanations else ()
    engine.check_view(detectors, view.site, view.layer, view.head)
    options = {"min_score": score, "sites": sites, "batch_size": batch_size, "left_out": left_out}
    results = engine.predict_each(detectors, pictures, **options)
    with Album(out, [each.label for each in detectors], score=score, view=view, attention=drawn) as album:
        for picture in explained_each(detectors, results) if explanations else results:
            album.add(picture)
    if not album.pictures:
        raise DataError(f"no picture could be read: {unreadable(left_out)}")
    for run, count in album.counts().items():
        typer.echo(f"{run}: {count} detections in {album.pictures} pictures")
    typer.echo(album.page)
    if left_out:
        raise DataError(f"left out: {unreadable(left_out)}")


def import_weights(
    source: Annotated[str, Argument(metavar="FILE|NAME", help="e.g. detr-r50, a file, a folder or id of Hugging Face")],
    save_as: Annotated[str | None, Option("--as", metavar="RUN", help="make a run of it, to be evaluated")] = None,
    settings: Settings = [],  # noqa: B006
) -> None:
    """Say what a file of weights is, and make a run of it."""
    from detrlib.checkpoints.files import describe
    from detrlib.runs.sources import free_path, open_source, save_run

    folder = None if save_as is None else free_path(save_as)
    found = open_source(source, overrides=pairs(settings, "--set", "model.backbone.dilation=true"))
    typer.echo(describe(found))
    if folder:
        save_run(found, folder)


def export(
    run: Annotated[str, Argument(metavar="RUN|NAME", help="a run, or whatever import takes")],
    path: Annotated[
        Path, Argument(help="FILE.safetensors, .pth (official), .pt2 or .onnx, or a folder (Hugging Face, detections)")
    ],
    layout: Annotated[
        Literal["safetensors", "official", "huggingface", "program", "onnx", "detections"] | None, Option("--format")
    ] = None,
    checkpoint: Checkpoint = "last",
) -> None:
    """Write a model for others: safetensors, the official layout, Hugging Face's, or a program of PyTorch's or ONNX.

    Or, as --format detections, what an evaluated run detects, with the objects, for FiftyOne and supervision.
    """
    from detrlib.checkpoints.export import export as write
    from detrlib.runs.exported import export_detections
    from detrlib.runs.folder import run_path
    from detrlib.runs.sources import open_source

    if layout == "detections":
        if checkpoint != "last":
            raise ConfigError("--format detections writes those that are stored; evaluate --checkpoint chooses whose")
        typer.echo(export_detections(run_path(run), path))
        return

    typer.echo(write(open_source(run, checkpoint), path, layout))
