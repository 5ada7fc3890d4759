"""The command line: `detrlib COMMAND`, or `python -m detrlib COMMAND`.

Every command is a function of the library with its arguments; heavy imports wait until a command is run, so that help
is fast. A fault that can be foreseen is one line on standard error and exit code 1, an interruption is 130, and a
training that a signal has stopped, to be started again, 75.
"""

import io
import os
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option

from detrlib import errors
from detrlib.benchmarks import programs, run_program
from detrlib.errors import STOPPED, ConfigError, DataError, DetrlibError, Stopped, listed, show_messages

Site = Literal["encoder_self", "decoder_self", "decoder_cross"]
MapSite = Literal["decoder_cross", "encoder_self"]  # whose keys are cells of the picture
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
        except DetrlibError as error:
            typer.echo(f"error: {error}", err=True)
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

RunName = Annotated[str, Argument(metavar="RUN", help="folder under papermill_runs/")]
Settings = Annotated[list[str], Option("--set", metavar="A.B=C...", help="settings, such as train.epochs=2")]
Gpus = Annotated[int | None, Option(min=0, help="how many; default: one if there is one")]
Processes = Annotated[int, Option(min=1, help="on the CPU, how many")]
Checkpoint = Annotated[str, Option(help="last, best, epoch-NNNN, or untrained")]


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


def pairs(items: list[str], option: str, example: str) -> dict[str, str]:
    """["a=1", ...] as a dictionary. Raises ConfigError naming the option."""
    if malformed := [item for item in items if not item.partition("=")[1]]:
        raise ConfigError(f"{option} {malformed[0]}: expected name=value, e.g. {example}")
    return dict(item.split("=", 1) for item in items)


def values_in(text: str | None, option: str, kind: type = str) -> list[Any]:
    """ "1,1.5,2" as a list. Raises ConfigError naming the option."""
    try:
        return [kind(part.strip()) for part in text.split(",")] if text else []
    except ValueError:
        raise ConfigError(f"{option} {text}: expected values between commas, e.g. 1,1.5,2") from None


def in_words(numbers: dict[str, float]) -> str:
    """Numbers of COCO in a line, undefined ones as a dash."""
    return "  ".join(f"{name} {f'{value:.3f}' if value >= 0 else '–'}" for name, value in numbers.items())


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


@app.command()
def train(
    config: Annotated[Path, Argument(help="YAML file, e.g. papermill_runs/configs/shapes.yaml")],
    name: Annotated[str, Option(help="folder under papermill_runs/; the same name resumes an unfinished run")],
    settings: Settings = [],  # noqa: B006, never changed
    gpus: Gpus = None,
    processes: Processes = 1,
) -> None:
    """Train a model, here or in several processes."""
    from detrlib.config import load_config
    from detrlib.engine.launch import launch
    from detrlib.runs.folder import run_path

    cfg = load_config(config, pairs(settings, "--set", "train.epochs=2"))
    results = launch(cfg, run_path(name), gpus, processes)
    numbers, floor = results["detection"], results.get("floor")
    known = floor and floor["AP"] >= 0
    beside = f"  (floor {floor['AP']:.3f}, {floor['AP50']:.3f})" if known else ""
    typer.echo(f"{in_words({cut: numbers[cut] for cut in ('AP', 'AP50')})}{beside}  {run_path(name)}")


@app.command()
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


@app.command(hidden=True)
def prepare(config: Path, name: Annotated[str, Option()], settings: Settings = []) -> None:  # noqa: B006
    """Make the folder of a run ready, once for all nodes of a cluster that then train in it."""
    from detrlib.config import load_config
    from detrlib.runs import open_run, run_path

    open_run(load_config(config, pairs(settings, "--set", "train.epochs=2")), run_path(name))


@app.command()
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
    for line in [*told, *([scored_classes(results)] if on else [])]:
        typer.echo(line)


@app.command()
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


@app.command()
def explain(
    run: RunName,
    images: Annotated[int, Option(min=1, help="the first images of the validation split")] = 50,
    methods: Annotated[str | None, Option(metavar="A,B", help="default: those of a pass or two; also drise")] = None,
    masks: Annotated[int, Option(min=1, help="of drise, published with 5000")] = 1000,
    steps: Annotated[int, Option(min=2, help="of deletion and of insertion")] = 16,
    checkpoint: Checkpoint = "last",
    unit: Annotated[Literal["cell", "pixel"], Option(help="what is deleted at a time")] = "cell",
    replacement: Annotated[Literal["mean", "blur"], Option(help="of deleted pixels")] = "mean",
    min_score: Annotated[float, Option(help="of the detections that are explained")] = 0.3,
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


@app.command()
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


@app.command()
def sweep(
    path: Annotated[Path, Argument(help="sweep file, e.g. papermill_runs/configs/quickstart.yaml")],
    name: Annotated[str | None, Option(help="folder under papermill_runs/; default: as the file is or says")] = None,
    parallel: Annotated[int | None, Option(min=1, help="runs side by side; default: one per GPU or core")] = None,
) -> None:
    """Train and measure several variants of one experiment, and draw what they show together."""
    from detrlib.experiments.sweep import sweep as run_sweep
    from detrlib.runs.folder import run_path

    typer.echo(run_sweep(path, run_path(name) if name else None, parallel))


@app.command(hidden=True)
def sweep_run(folder: Path) -> None:
    """One run of a sweep in a process of its own."""
    from detrlib.engine.children import follow
    from detrlib.engine.notebooks import execute_asked

    follow()
    execute_asked(folder)


@app.command()
def notebook(
    name: Annotated[str, Argument(help="such as 07_evaluate, or evaluate")],
    output: Annotated[Path, Argument(help="where the executed copy goes")],
    parameters: Annotated[list[str], Option("-p", metavar="NAME=VALUE...", help="parameters")] = [],  # noqa: B006
) -> None:
    """Execute a notebook headless; its parameters are checked before anything runs."""
    from detrlib.engine.notebooks import execute_notebook
    from detrlib.runs.folder import run_path
    from detrlib.runs.owner import owned

    values = pairs(parameters, "-p", "run_name=first")
    run = values.get("run_name")
    with owned(run_path(run)) if run else nullcontext():  # nobody else writes its copy of the notebook either
        typer.echo(execute_notebook(name, output, values, progress=True))


@app.command("import")
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


@app.command()
def export(
    run: Annotated[str, Argument(metavar="RUN|NAME", help="a run, or whatever import takes")],
    path: Annotated[
        Path, Argument(help="FILE.safetensors, .pth (official), .pt2 or .onnx, or a folder (Hugging Face)")
    ],
    layout: Annotated[
        Literal["safetensors", "official", "huggingface", "program", "onnx"] | None, Option("--format")
    ] = None,
    checkpoint: Checkpoint = "last",
) -> None:
    """Write a model for others: safetensors, the official layout, Hugging Face's, or a program of PyTorch's or ONNX."""
    from detrlib.checkpoints.export import export as write
    from detrlib.runs.sources import open_source

    typer.echo(write(open_source(run, checkpoint), path, layout))


@app.command()
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


@app.command()
def costs(
    config: Annotated[Path, Argument(help="YAML file of a run")],
    settings: Settings = [],  # noqa: B006
    size: Annotated[str, Option(metavar="H,W", help="pixels of the image; default: data.image_size, at 3:4")] = "",
    latency: Annotated[bool, Option("--latency", help="also measure milliseconds")] = False,
    memory: Annotated[float | None, Option(metavar="GIB", help="also say how many images train in so much")] = None,
) -> None:
    """Parameters, GFLOPs and time of a model, by component, and the memory that training takes."""
    from detrlib.config import load_config
    from detrlib.experiments.costs import cost_table
    from detrlib.models import build_model

    cfg = load_config(config, {"model.num_classes": 91} | pairs(settings, "--set", "model.norm=pre"))
    short = cfg.data.image_size
    pixels = values_in(size or f"{short},{short * 4 // 3}", "--size", int)
    if len(pixels) != 2 or min(pixels) < 1:
        raise ConfigError(f"--size {size}: expected height and width in pixels, e.g. 800,1066")
    model = build_model(cfg.model, backbone_weights="none")
    table = cost_table({config.stem: model}, tuple(pixels)).drop(columns="model")
    if latency:
        from detrlib.benchmarks.latency import measure_latency

        table["milliseconds"] = table["component"].map(measure_latency(model, tuple(pixels)))
    typer.echo(table.round(2).to_string(index=False))
    if memory is not None:
        from detrlib.engine.memory import training_memory

        typer.echo(training_memory(cfg, tuple(pixels), memory))


@app.command()
def benchmark(
    what: Annotated[str, Argument(metavar="WHAT", help=" | ".join(programs()))],
    out: Annotated[Path, Option(help="folder of the tables and the numbers")] = Path("build/benchmarks"),
) -> None:
    """Measure speed and memory of this machine, beside other implementations."""
    run_program(what, out)


@app.command()
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
    sharpen: Annotated[float | None, Option(help="standard deviation of scores; default for random weights: 4")] = None,
    size: Annotated[int, Option(min=64, help="pixels of noise and, for random weights, of the shorter side")] = 640,
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


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
