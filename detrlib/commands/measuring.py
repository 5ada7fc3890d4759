"""Measure what was trained: detection and attention, explanations, interventions; detectors of Hugging Face too."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Argument, Option

from detrlib.commands import (
    MOST_PIXELS,
    Checkpoint,
    Gpus,
    Processes,
    RunName,
    Settings,
    Site,
    in_words,
    pairs,
    values_in,
)
from detrlib.errors import ConfigError, listed


def evaluate(
    run: RunName,
    checkpoint: Checkpoint = "last",
    split: Annotated[str | None, Option(help="another split of the same data, or of that given as --on")] = None,
    settings: Settings = [],  # noqa: B006
    on: Annotated[Path | None, Option(help="other data: a folder, data.yaml or COCO file")] = None,
    images: Annotated[Path | None, Option(help="folder of its pictures, if not near the annotation file")] = None,
    renamed: Annotated[list[str], Option("--map", metavar="THEIRS=OURS...", help="names of its classes")] = [],  # noqa: B006
    by_id: Annotated[bool, Option("--by-id", help="its category ids are the run's, whatever the names")] = False,
    save_as: Annotated[str | None, Option("--as", help="folder of the results inside the run")] = None,
    predictions: Annotated[Path | None, Option(help="make the run of any detector's COCO-format detections")] = None,
    data: Annotated[Path | None, Option(help="what --predictions are of: a config, or as --on")] = None,
    gpus: Gpus = None,
    processes: Processes = 1,
) -> None:
    """Measure a run: AP, sparsity of attention, and where it looks; on its own data or on other data.

    Or make a run of the detections of any detector, to be compared with others: --predictions FILE.json --data DATA.
    """
    from detrlib.engine.advice import floor_and_collapse, where_attention_rests
    from detrlib.engine.evaluate import evaluate_run
    from detrlib.engine.launch import in_processes
    from detrlib.experiments.predictions import evaluate_predictions
    from detrlib.experiments.transfer import evaluate_on, scored_classes
    from detrlib.figures.viewer import refresh_viewers
    from detrlib.metrics.detection import UNDEFINED
    from detrlib.runs.folder import run_path

    shared = {"gpus": gpus, "processes": processes, "overrides": pairs(settings, "--set", "evaluate.paibb=thesis")}
    names = pairs(renamed, "--map", "bike=bicycle")
    if predictions or data:
        others = on or names or by_id or save_as or checkpoint != "last" or (gpus, processes) != (None, 1)
        if not (predictions and data) or others:
            raise ConfigError("--predictions needs --data, and takes --split, --images and --set besides")
        chosen = {"images": images, "overrides": shared["overrides"]}
        results = evaluate_predictions(run_path(run), predictions, data, split, **chosen)
    elif on is None:
        if images or names or by_id or save_as:
            raise ConfigError("--images, --map, --by-id and --as belong to data given as --on")
        results = in_processes(evaluate_run, run_path(run), checkpoint, split, **shared)
    else:
        chosen = {"images": images, "names": names, "by_id": by_id, "save_as": save_as}
        results = in_processes(evaluate_on, run_path(run), on, checkpoint, split, **chosen, **shared)
    typer.echo(in_words({name: value for name, value in results["detection"].items() if name != "per_class"}))
    missing = [name for name, own in results["detection"]["per_class"].items() if own["AP"] == UNDEFINED]
    if missing:
        typer.echo(f"no objects in this split, and no AP: {listed(missing)}")
    told = [*floor_and_collapse(results), *where_attention_rests(results)]
    told += [scored_classes(results)] if on else []
    for line in told:
        typer.echo(line)
    for path in refresh_viewers(run_path(run)):
        typer.echo(f"to look through in a browser: {path}")


def explain(
    run: RunName,
    images: Annotated[int, Option(min=1, help="the first images of the validation split")] = 50,
    methods: Annotated[str | None, Option(metavar="A,B", help="default: those of a pass or two; also drise")] = None,
    masks: Annotated[int, Option(min=1, max=10**6, help="of drise, published with 5000")] = 1000,
    steps: Annotated[int, Option(min=2, max=4096, help="of deletion and of insertion")] = 16,
    checkpoint: Checkpoint = "last",
    unit: Annotated[Literal["cell", "pixel"], Option(help="what is deleted at a time")] = "cell",
    replacement: Annotated[Literal["mean", "blur"], Option(help="of deleted pixels")] = "mean",
    min_score: Annotated[float, Option(min=0, max=1, help="of the detections explained")] = 0.3,
    all_queries: Annotated[bool, Option("--all-queries", help="also those that no object is matched to")] = False,
    batch_size: Annotated[int, Option(min=1, help="pictures the model sees at a time")] = 64,
    gpus: Gpus = None,
    processes: Processes = 1,
) -> None:
    """Deletion and insertion curves of attention maps, gradients, ODAM and D-RISE, beside the predicted box."""
    from detrlib.engine.launch import in_processes
    from detrlib.experiments.explain import faithfulness_run
    from detrlib.figures.explanations import faithfulness_table
    from detrlib.runs.folder import run_path

    names = values_in(methods, "--methods") or None
    options = {"unit": unit, "replacement": replacement, "min_score": min_score, "batch_size": batch_size}
    options |= {"checkpoint": checkpoint, "matched": not all_queries, "masks": masks}
    shared = {"gpus": gpus, "processes": processes}
    frame = in_processes(faithfulness_run, run_path(run), images, names, steps, **options, **shared)
    table = faithfulness_table({run: frame}).drop(columns="run")
    typer.echo(table.round(3).to_string(index=False, na_rep=""))


def intervene(
    run: RunName,
    site: Annotated[Site, Option(help="where attention is changed and measured")] = "decoder_cross",
    alphas: Annotated[str | None, Option(metavar="A,B", help="1 (softmax) to 2 (sparsemax)")] = None,
    transforms: Annotated[str | None, Option(metavar="A,B", help="names of transforms")] = None,
    layer: Annotated[int | None, Option(help="alphas and transforms in this layer only, from 0")] = None,
    learned_alphas: Annotated[bool, Option("--learned-alphas", help="learned ones: their mean, and shuffled")] = False,
    prune_heads: Annotated[bool, Option("--prune-heads", help="every head alone, then one after the other")] = False,
    sinks: Annotated[str | None, Option(metavar="A,B", help="masked, zeroed: keys on which heads rest")] = None,
    ablate: Annotated[
        str | None,
        Option(
            metavar="A,B",
            help="without queries, embeddings, single_queries, layers, sites, feedforward, levels, points",
        ),
    ] = None,
    order_images: Annotated[int, Option(min=1, help="training images that give the order of heads, queries")] = 100,
    images: Annotated[int | None, Option(min=1, help="the first of the validation split; default: all")] = None,
    checkpoint: Checkpoint = "last",
    gpus: Gpus = None,
    processes: Processes = 1,
) -> None:
    """AP and PAIBB of a trained model with another transform, alpha, fewer heads, or without some of its parts."""
    from detrlib.engine.launch import in_processes
    from detrlib.experiments.intervene import measure_plan
    from detrlib.runs.folder import run_path

    table = in_processes(
        measure_plan,
        run_path(run),
        images,
        checkpoint,
        gpus=gpus,
        processes=processes,
        site=site,
        alphas=values_in(alphas, "--alphas", float),
        transforms=values_in(transforms, "--transforms"),
        layer=layer,
        learned=learned_alphas,
        prune_heads=prune_heads,
        sinks=values_in(sinks, "--sinks"),
        ablate=values_in(ablate, "--ablate"),
        order_images=order_images,
    )
    typer.echo(table.drop(columns=["site", "checkpoint"]).round(4).to_string(index=False, na_rep=""))


def figures(
    names: Annotated[list[str], Argument(metavar="RUN...", help="folders under papermill_runs/, seeds too")],
    out: Annotated[Path, Option(help="folder for them, for thesis.tex and for the executed notebook")],
    parameters: Annotated[list[str], Option("-p", metavar="NAME=VALUE...", help="others of 09_thesis_figures")] = [],  # noqa: B006
) -> None:
    """Every figure (PDF, PNG) and table (LaTeX, Markdown) of finished runs, and a LaTeX document of them all.

    They are those of notebook 09_thesis_figures, which is executed; its copy lies beside them.
    """
    from detrlib import runs
    from detrlib.engine.notebooks import execute_notebook, find_notebook
    from detrlib.figures.album import check_folder
    from detrlib.figures.thesis import DOCUMENT, left_out

    values = pairs(parameters, "-p", "resamples=200")
    if own := values.keys() & {"run_names", "output"}:
        raise ConfigError(f"-p {min(own)}: runs are given as arguments, the folder as --out")
    run_dirs = runs.find_runs(names)
    for run_dir in run_dirs:
        runs.load_results(run_dir)  # says what is missing, before a minute has passed
    check_folder(out)
    folder, notebook = out.resolve(), find_notebook("thesis_figures").name
    values |= {"run_names": [runs.run_name(run_dir) for run_dir in run_dirs], "output": runs.within_project(folder)}
    execute_notebook("thesis_figures", folder / notebook, values, progress=True)
    for line in left_out(folder):
        typer.echo(f"nothing to show: {line}")
    typer.echo(folder / DOCUMENT)


def huggingface(
    models: Annotated[
        list[str] | None, Argument(metavar="MODEL...", help="ids, folders; types: random weights")
    ] = None,
    data: Annotated[Path | None, Option(help="a folder with objects, such as COCO's; as evaluate --on")] = None,
    split: Annotated[str | None, Option(help="of the data; default: val2017, or the only one")] = None,
    pictures: Annotated[list[str], Option(help="in place of data: files, folders or globs; default: noise")] = [],  # noqa: B006
    limit: Annotated[int | None, Option(min=1, help="the first images only")] = None,
    transforms: Annotated[
        str, Option(metavar="A,B", help="softmax: as they are; others at one site at a time")
    ] = "softmax",
    null_keys: Annotated[str, Option(metavar="A,B", help="none, zero: beside each of the transforms")] = "none",
    sites: Annotated[str | None, Option(metavar="A,B", help="default: all that a model has")] = None,
    sharpen: Annotated[
        float | None,
        Option(min=0, max=1000, help="standard deviation of scores; default for random weights: 4"),
    ] = None,
    size: Annotated[
        int, Option(min=64, max=MOST_PIXELS, help="pixels of noise and, for random weights, of the shorter side")
    ] = 640,
    cpu: Annotated[bool, Option("--cpu", help="stay on the CPU where there is a GPU")] = False,
    batch_size: Annotated[int, Option(min=1, help="images a model sees at a time")] = 4,
    out: Annotated[Path | None, Option(help="folder for the table, and for what is resumed from")] = None,
) -> None:
    """Sinks and zeros of the attention of Hugging Face's detectors at every site; with objects, AP and PAIBB too.

    MODEL is an id such as PekingU/rtdetr_v2_r18vd, a folder, or a type such as rt_detr_v2; by default the types detr,
    rt_detr_v2 and d_fine, whose weights are random and whose scores are sharpened. With --out, passes that were
    finished before are not repeated.
    """
    from detrlib.experiments.huggingface import SETTINGS, attention_passes, attention_table, page
    from detrlib.figures.album import check_folder
    from detrlib.figures.tables import save_table

    if out:
        check_folder(out)
    images = {
        "data": data,
        "split": split,
        "pictures": pictures,
        "limit": limit,
        "size": size,
        "batch_size": batch_size,
    }
    how = {"sharpen": sharpen, "cpu": cpu, "keep": out and out / "huggingface.json", "progress": True} | SETTINGS
    how |= {"sites": values_in(sites, "--sites")} if sites else {}
    models, names = models or ["detr", "rt_detr_v2", "d_fine"], values_in(transforms, "--transforms")
    passes = attention_passes(models, names, values_in(null_keys, "--null-keys"), **images, **how)
    table = attention_table(passes)
    shown = page(table)
    typer.echo(shown.round(3).to_string(na_rep="–"))
    if out:
        table.to_csv(out / "huggingface.csv", index=False)
        save_table(shown, "huggingface", "Sinks and zeros of attention.", out, f"{images} {how}", unranked=list(shown))
