"""Settings and small things that tests share; the settings are made before torch is imported, for child processes too.

Helpers are fixtures that give a function: small models and padded batches for them, and the smallest training run.
"""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

os.environ.setdefault("OMP_NUM_THREADS", str(min(4, os.cpu_count() or 1)))  # tiny tensors gain nothing from more
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["MPLBACKEND"] = "Agg"
os.environ["WANDB_MODE"] = "disabled"
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded
os.environ["ACCELERATE_USE_CPU"] = "true"  # runs are compared bit for bit, which no GPU promises

import matplotlib.pyplot as plt
import torch
from accelerate.state import AcceleratorState
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from detrlib.config import PROJECT, Model, load_config
from detrlib.models import build_model

# What nohup or a shell's & ignores stays ignored in what it starts, and then programs rightly do not heed it.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

TINY_RUN = {  # passes through every part of the code: a second on one CPU core
    "data.shapes": {"train": 32, "val": 13, "size": 64},
    "data.image_size": 64,
    "data.augment": "flip",
    "data.workers": 0,
    "model.backbone": {"name": "tiny", "weights": "none"},
    "model.hidden_dim": 32,
    "model.num_heads": 4,
    "model.encoder_layers": 1,
    "model.decoder_layers": 2,
    "model.feedforward_dim": 32,
    "model.num_queries": 10,
    "train.epochs": 2,
    "train.batch_size": 8,
    "train.lr": 1e-3,
    "train.lr_backbone": 1e-3,
    "train.log_every": 1,
    "evaluate.examples": 2,
}
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_configure(config):
    """A cache of this session's own, so that no test reads what an older version of the code has drawn."""
    if "DETRLIB_CACHE" not in os.environ:
        config._detrlib_cache = os.environ["DETRLIB_CACHE"] = tempfile.mkdtemp(prefix="detrlib-tests-")


def pytest_ignore_collect(collection_path, config):
    """With -m gpu only files that have such tests are read: others need packages that a machine with a GPU may lack."""
    if config.option.markexpr == "gpu" and collection_path.name.startswith("test_"):
        return "mark.gpu" not in collection_path.read_text() or None


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


def pytest_unconfigure(config):
    """Remove the session's cache, and leave one that was given alone."""
    if hasattr(config, "_detrlib_cache"):
        shutil.rmtree(config._detrlib_cache, ignore_errors=True)
        del os.environ["DETRLIB_CACHE"]


@pytest.fixture
def gpu(monkeypatch):
    """A GPU, which is Accelerate's device too as long as a test lasts; float32 is not rounded to TF32."""
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    AcceleratorState._reset_state(reset_partial_state=True)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield torch.device("cuda")
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real photographs next to the checkout; a test that needs it is skipped where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the real sample data (shared/data next to the checkout) is not on this machine")
    return SHARED_DATA


@pytest.fixture(scope="session")
def model_settings():
    def model_settings(**settings) -> Model:
        """The settings of a model, checked like those of a file; sections may be given as dictionaries."""
        return load_config(overrides={"model": settings}).model

    return model_settings


@pytest.fixture(scope="session")
def small(model_settings, randomise):
    def small(seed: int = 0, **settings) -> nn.Module:
        """A small model whose depths, heads and widths are all different; no parameter or statistic is left at zero."""
        defaults = {
            "backbone": {"name": "tiny", "weights": "none"},
            "hidden_dim": 32,
            "num_heads": 4,
            "encoder_layers": 2,
            "decoder_layers": 3,
            "feedforward_dim": 48,
            "num_queries": 7,
            "num_classes": 5,
        }
        torch.manual_seed(seed)
        model = build_model(model_settings(**defaults | settings)).eval()
        randomise(model)
        return model

    return small


@pytest.fixture(scope="session")
def randomise():
    @torch.no_grad()
    def randomise(model: nn.Module) -> None:
        """Move biases and norms away from 0 and 1, so that forgetting or swapping one shows."""
        for name, value in model.state_dict().items():
            if name.endswith(("bias", "running_mean")):
                value.add_(0.2 * torch.randn_like(value))
            elif value.dim() == 1 and name.endswith(("weight", "running_var")):
                value.mul_(0.5 + 0.7 * torch.rand_like(value))
            elif "in_proj_weight" in name:
                value.mul_(4.0)  # attention that looks somewhere, so that queries and images differ
        for layer in model.modules():
            if isinstance(layer, nn.Linear) and not layer.weight.any():
                nn.init.normal_(layer.weight, std=0.1)  # corrections of boxes and offsets of samples start at zero

    return randomise


@pytest.fixture(scope="session")
def huggingface_detector():
    """A function that makes small detectors of transformers, which see four cells along 128 pixels."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    shared = {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "num_queries": 11,
    }
    hybrid = {"encoder_hidden_dim": 32, "encoder_in_channels": [16, 24, 32], "decoder_in_channels": [32, 32, 32]}

    def huggingface_detector(family: str, attention: str | None = "eager", seed: int = 0, **settings) -> nn.Module:
        """One with weights that make attention look somewhere; None for `attention` is what transformers chooses."""
        key = repr((family, attention, seed, settings))
        if key not in made:
            made[key] = build(family, attention, seed, settings)
        return copy.deepcopy(made[key])

    made = {}

    def build(family, attention, seed, settings):
        tiny = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}
        pyramid = tiny | {"out_features": ["stage2", "stage3", "stage4"]}
        resnet, rt_resnet = transformers.ResNetConfig, transformers.RTDetrResNetConfig
        if family in ("rt_detr", "rt_detr_v2", "d_fine", "deimv2"):
            own = hybrid | {"encoder_layers": 1, "backbone_config": rt_resnet(**pyramid)}
        elif family == "deformable_detr":
            own = {"num_feature_levels": 3, "use_timm_backbone": False, "backbone_config": resnet(**pyramid)}
        else:
            own = {"use_timm_backbone": False, "backbone_config": resnet(**tiny, out_features=["stage4"])}
        if family == "dab-detr":
            own["hidden_size"] = 32
        config = transformers.AutoConfig.for_model(family, **shared | own | settings)
        torch.manual_seed(seed)
        model = transformers.AutoModelForObjectDetection.from_config(config, attn_implementation=attention).eval()
        with torch.no_grad():
            for layer in model.modules():
                if isinstance(layer, nn.Linear):
                    layer.weight.normal_(0, 0.2)
        return model

    return huggingface_detector


@pytest.fixture(scope="session")
def huggingface_settings():
    """A function that makes settings of a small detector of transformers, as overrides of a config."""
    pytest.importorskip("transformers").logging.set_verbosity_error()
    layers = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_layers": 2, "num_queries": 11}
    layers |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    hybrid = {"encoder_hidden_dim": 32, "encoder_in_channels": [16, 24, 32], "decoder_in_channels": [32, 32, 32]}

    def huggingface_settings(kind: str, **settings) -> dict:
        """`settings` of the section model, such as num_classes."""
        square = kind in ("rt_detr", "rt_detr_v2", "d_fine")
        backbone = {"model_type": "rt_detr_resnet" if square else "resnet", "layer_type": "basic"}
        backbone |= {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
        several = square or kind == "deformable_detr"
        backbone["out_features"] = ["stage2", "stage3", "stage4"] if several else ["stage4"]
        options = layers | {"backbone_config": backbone, "hidden_size" if kind == "dab_detr" else "d_model": 32}
        options |= hybrid if square else {"encoder_layers": 2}
        options |= {"num_feature_levels": 3} if kind == "deformable_detr" else {}
        model = {"architecture": "huggingface", "type": kind, "num_classes": 5, "options": options}
        return {"model": model | ({"square": 64} if square else {}) | settings}

    return huggingface_settings


@pytest.fixture(scope="session")
def padded_batch():
    def padded_batch(*sizes: tuple[int, int], canvas: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Random images of `sizes` in the corners of a canvas, and their padding."""
        generator = torch.Generator().manual_seed(1)
        images, padding = torch.zeros(len(sizes), 3, *canvas), torch.ones(len(sizes), *canvas, dtype=torch.bool)
        for i, (height, width) in enumerate(sizes):
            images[i, :, :height, :width] = torch.randn(3, height, width, generator=generator)
            padding[i, :height, :width] = False
        return images, padding

    return padded_batch


@pytest.fixture(scope="session")
def trainable():
    def trainable(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters() if p.requires_grad)

    return trainable


@pytest.fixture(scope="session")
def tiny_config():
    def tiny_config(overrides=None):
        """The settings of a tiny run with dotted `overrides`."""
        return load_config(None, TINY_RUN | (overrides or {}))

    return tiny_config


@pytest.fixture(scope="session")
def write_layout():
    def write_layout(root: Path, layout: str, **counts: int) -> Path:
        """The same small data set in a layout that people have; returns its folder.

        Splits train, val and test of 4, 3 and 2 pictures of 48 x 40, each with one cat or dog in turn, at (4 + number,
        6), of 20 x 16 pixels; the last picture of each has none. `counts` are of other splits.
        """
        for split, count in (counts or {"train": 4, "val": 3, "test": 2}).items():
            WRITE[layout](root, split, [{"name": f"{split}{n}", "box": (4 + n, 6, 20, 16)} for n in range(count)])
        return root

    return write_layout


def draw(folder: Path, objects: list[dict]) -> None:
    """The pictures of a split: grey, with a rectangle in the colour of its class."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, one in enumerate(objects):
        picture = Image.new("RGB", (48, 40), (90, 120, 60))
        one["class"] = None if number == len(objects) - 1 else number % 2
        if one["class"] is not None:
            x, y, w, h = one["box"]
            picture.paste(((250, 20, 20), (20, 20, 250))[one["class"]], (x, y, x + w, y + h))
        picture.save(folder / f"{one['name']}.png")


def write_coco(images: Path, annotations: Path, objects: list[dict]) -> None:
    draw(images, objects)
    annotations.parent.mkdir(parents=True, exist_ok=True)
    records = [{"id": n, "file_name": f"{one['name']}.png", "width": 48, "height": 40} for n, one in enumerate(objects)]
    found = [
        {"id": n, "image_id": n, "category_id": one["class"], "bbox": list(one["box"]), "iscrowd": 0}
        for n, one in enumerate(objects)
        if one["class"] is not None
    ]
    categories = [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]
    annotations.write_text(json.dumps({"images": records, "annotations": found, "categories": categories}))


def write_yolo(root: Path, split: str, objects: list[dict]) -> None:
    draw(root / "images" / split, objects)
    labels = root / "labels" / split
    labels.mkdir(parents=True)
    for one in objects:
        x, y, w, h = one["box"]
        line = f"{one['class']} {(x + w / 2) / 48} {(y + h / 2) / 40} {w / 48} {h / 40}\n"
        (labels / f"{one['name']}.txt").write_text("" if one["class"] is None else line)
    with (root / "data.yaml").open("a") as file:
        file.write(f"{split}: images/{split}\n")
        file.write("names: [cat, dog]\n" if split == "train" else "")


def write_xml(folder: Path, objects: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for one in objects:
        x, y, w, h = one["box"]
        corners = f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax>"
        name = "" if one["class"] is None else ("cat", "dog")[one["class"]]
        found = f"<object><name>{name}</name><bndbox>{corners}</bndbox></object>" if name else ""
        size = "<size><width>48</width><height>40</height><depth>3</depth></size>"
        (folder / f"{one['name']}.xml").write_text(f"<annotation>{size}{found}</annotation>")


def write_voc(root: Path, split: str, objects: list[dict]) -> None:
    draw(root / "JPEGImages", objects)
    write_xml(root / "Annotations", objects)
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True, exist_ok=True)
    (lists / f"{split}.txt").write_text("".join(f"{one['name']}\n" for one in objects))
    (lists / f"cat_{split}.txt").write_text("".join(f"{one['name']} -1\n" for one in objects))


def write_voc_beside(root: Path, split: str, objects: list[dict]) -> None:
    draw(root / split, objects)
    write_xml(root / split, objects)


def of_roboflow(split: str) -> str:
    return {"val": "valid"}.get(split, split)


WRITE = {
    "coco": lambda root, split, objects: write_coco(
        root / f"{split}2017", root / "annotations" / f"instances_{split}2017.json", objects
    ),
    "roboflow": lambda root, split, objects: write_coco(
        root / of_roboflow(split), root / of_roboflow(split) / "_annotations.coco.json", objects
    ),
    "yolo": write_yolo,
    "voc": write_voc,
    "voc beside pictures": write_voc_beside,
}


@pytest.fixture(scope="session")
def metrics_without_times():
    def metrics_without_times(run_dir):
        """Records of metrics.jsonl without what a clock has measured."""
        records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
        measured = ("extra/iter_time", "extra/data_time", "extra/memory_mb")
        return [{k: v for k, v in record.items() if k not in measured} for record in records]

    return metrics_without_times


@pytest.fixture(scope="session")
def texts():
    def texts(drawn: Figure) -> list[str]:
        """Every text of a figure once it is drawn, titles, labels and legends included."""
        drawn.canvas.draw()
        return [text.get_text() for text in drawn.findobj(lambda item: hasattr(item, "get_text")) if text.get_text()]

    return texts


@pytest.fixture(scope="session")
def compiled():
    engine = next(filter(shutil.which, ("tectonic", "pdflatex")), None)
    if engine is None:
        pytest.skip("no LaTeX here: tectonic, or texlive-latex-extra with lmodern, compiles documents")

    def compiled(path: Path) -> str:
        """What LaTeX has to say of a document, which it turns into a PDF beside it; twice, for references."""
        options = ["--keep-logs"] if engine == "tectonic" else ["-interaction=nonstopmode", "-halt-on-error"]
        for _ in range(2):
            done = subprocess.run([engine, *options, path.name], cwd=path.parent, capture_output=True, timeout=300)
            assert done.returncode == 0, done.stdout.decode(errors="replace")[-3000:]
        return path.with_suffix(".log").read_text(errors="replace").replace("\n", "")

    return compiled


@pytest.fixture(scope="session")
def random_boxes():
    def random_boxes(*shape: int) -> torch.Tensor:
        """cxcywh boxes within the image."""
        size = 0.05 + 0.5 * torch.rand(*shape, 2)
        return torch.cat([size / 2 + torch.rand(*shape, 2) * (1 - size), size], -1)

    return random_boxes


@pytest.fixture
def leaves_nothing_behind():
    """No figure stays in pyplot's register, and no setting outlives the call that made it."""
    before = dict(plt.rcParams)
    yield
    assert plt.get_fignums() == []
    assert dict(plt.rcParams) == before


@pytest.fixture(scope="session")
def official_swin_names():
    def official_swin_names(*more: str) -> set[str]:
        """Entries of an official Swin-T without its classifier and masks, 181, and those of `more` modules."""

        def both(*modules: str) -> set[str]:
            return {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}

        names = both("patch_embed.proj", "patch_embed.norm")
        for stage, depth in enumerate((2, 2, 6, 2)):
            for place in (f"layers.{stage}.blocks.{i}" for i in range(depth)):
                names |= both(*(f"{place}.{part}" for part in ("norm1", "norm2", "attn.qkv", "attn.proj")))
                names |= both(f"{place}.mlp.fc1", f"{place}.mlp.fc2")
                names |= {f"{place}.attn.relative_position_bias_table", f"{place}.attn.relative_position_index"}
            if stage < 3:
                place = f"layers.{stage}.downsample"
                names |= both(f"{place}.norm") | {f"{place}.reduction.weight"}
        assert len(names) == 181
        return names | both(*more)

    return official_swin_names


@pytest.fixture
def ended(tmp_path):
    """A function that starts a command, sends it a signal once training is under way, and waits for all it has started.

    Generous waits: what matters is that everything is gone.
    """
    begun, patience = [], 3600

    def ended(command: list, *signals: int) -> tuple[int, str]:
        log = tmp_path / "command.txt"
        with log.open("w") as file:
            process = psutil.Popen(
                [sys.executable, "-m", *map(str, command)],
                cwd=PROJECT,
                env=dict(os.environ, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1"),
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        begun.append(process)
        latest = time.monotonic() + patience
        while not any(path.stat().st_size for path in [*tmp_path.glob("**/metrics.jsonl")]):
            assert process.poll() is None and time.monotonic() < latest, log.read_text()
            time.sleep(0.2)
        begun.extend(process.children(recursive=True))
        for number, pause in zip(signals, (3, 0), strict=False):
            process.send_signal(number)
            time.sleep(pause if len(signals) > 1 else 0)
        code = process.wait(patience)
        _, left = psutil.wait_procs(begun, timeout=patience)
        assert left == [], log.read_text()
        return code, log.read_text()

    yield ended
    for process in begun:
        with suppress(psutil.NoSuchProcess):
            process.kill()
