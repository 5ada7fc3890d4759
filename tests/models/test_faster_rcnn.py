"""torchvision's Faster R-CNN as a run like any other: the detections are torchvision's, the evaluation is ours."""

import contextlib
import copy
import io
import json
import re
import sys

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torchvision.models.detection import (
    FasterRCNN_ResNet50_FPN_Weights,
    fasterrcnn_resnet50_fpn,
    fasterrcnn_resnet50_fpn_v2,
)
from torchvision.models.detection.image_list import ImageList
from torchvision.ops.misc import FrozenBatchNorm2d

from detrlib import runs
from detrlib.boxes import cxcywh_to_xyxy, to_pixels
from detrlib.checkpoints import files as checkpoints
from detrlib.checkpoints.files import export_official, load_official, read_official
from detrlib.config import load_config, replace
from detrlib.data import build_dataset
from detrlib.data.augment import MEAN, STD
from detrlib.engine import evaluate as evaluation
from detrlib.engine.evaluate import evaluate, evaluate_run, load_model
from detrlib.engine.launch import launch
from detrlib.engine.loop import train
from detrlib.errors import ConfigError, RunError, WeightsError
from detrlib.figures.results import per_layer
from detrlib.figures.tables import markdown_table
from detrlib.files import write_json
from detrlib.metrics.detection import coco_ap
from detrlib.models import Predictions
from detrlib.runs import results as frames

SIZES = [(64, 90), (80, 64), (64, 70)]  # two of them on one canvas, and all smaller than the batch
SHAPES = {"data.shapes": {"train": 0, "val": 3, "size": 64}, "data.image_size": 64, "data.workers": 0}
SETTINGS = {"model.architecture": "faster_rcnn", "model.backbone.weights": "none", "model.num_classes": 91}
PROPOSALS = 20  # enough to compare, and quick


def picture(height, width, seed):
    """Rectangles of random colours [3,H,W] in 0..1."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.zeros(3, height, width)
    for _ in range(25):
        (top, left), colour = torch.rand(2, generator=generator), torch.rand(3, generator=generator)
        y, x = int(0.9 * top * height), int(0.9 * left * width)
        h, w = (torch.rand(2, generator=generator) * 40 + 4).int().tolist()
        image[:, y : y + h, x : x + w] = colour[:, None, None]
    return image


def normalised(image):
    return (image - image.new_tensor(MEAN).view(3, 1, 1)) / image.new_tensor(STD).view(3, 1, 1)


@torch.no_grad()
def spread(layer, inputs, dims, std):
    """Give the outputs of `layer` zero mean over `dims` and a standard deviation of `std`."""
    mean = layer(inputs).mean(dims)
    shape = [-1 if axis == 1 else 1 for axis in range(inputs.dim())]
    scale = std / (layer(inputs) - mean.view(shape)).std()
    layer.bias.copy_((layer.bias - mean) * scale)
    layer.weight.mul_(scale)


@torch.no_grad()
def reference(build, eps):
    """torchvision's model with random weights under which, as under trained ones, places and classes differ."""
    torch.manual_seed(0)
    model = build(weights=None, weights_backbone=None, min_size=64, max_size=128, rpn_post_nms_top_n_test=PROPOSALS)
    images = normalised(torch.stack([picture(64, 64, seed) for seed in (7, 8)]))
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    model.backbone(images)  # statistics that fit the weights
    for norm in norms:
        norm.eps = eps
        norm.bias.uniform_(-0.2, 0.2)
        norm.weight.mul_(0.8 + 0.4 * torch.rand_like(norm.weight))
    model.eval()
    features = model.backbone(images)
    head, heads = model.rpn.head, model.roi_heads
    for layer, std in ((head.cls_logits, 1.0), (head.bbox_pred, 0.1)):
        spread(layer, head.conv(features["0"]), (0, 2, 3), std)
    proposals, _ = model.rpn(ImageList(images, [(64, 64)] * 2), features)
    regions = heads.box_head(heads.box_roi_pool(features, proposals, [(64, 64)]))
    heads.box_roi_pool.scales = None
    spread(heads.box_predictor.cls_score, regions, 0, 1.2)
    spread(heads.box_predictor.bbox_pred, regions, 0, 0.5)
    return model


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """torchvision's model of version 1, and a file of it with the names of the published one."""
    model = reference(fasterrcnn_resnet50_fpn, 0.0)
    path = tmp_path_factory.mktemp("torchvision") / "fasterrcnn_resnet50_fpn_coco.pth"
    torch.save({old_name(name): value for name, value in published(model).items()}, path)
    return model, path


def published(model):
    """Entries of a file of version 1: batch norms are frozen and count no batches."""
    return {name: value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")}


def old_name(name):
    name = re.sub(r"(fpn\.(?:inner|layer)_blocks\.\d)\.0\.", r"\1.", name)
    return name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")


@pytest.fixture(scope="module")
def run_dir(official, tmp_path_factory):
    """The run that the command line makes of the file."""
    folder = tmp_path_factory.mktemp("runs") / "faster-rcnn"
    settings = ["data.root=shapes", "data.shapes={train: 0, val: 2, size: 64}", "data.image_size=64", "data.workers=0"]
    words = [word for setting in settings for word in ("--set", setting)]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as shown:
        patch.setattr(sys, "argv", ["checkpoints", str(official[1]), "--as", str(folder), *words])
        checkpoints.main()
    assert shown.getvalue().startswith("faster_rcnn, ") and "model.num_classes: 91" in shown.getvalue()
    return folder


@pytest.fixture(scope="module")
def model(run_dir):
    return quick(load_model(run_dir))


def quick(model):
    model.rpn._post_nms_top_n = {"training": PROPOSALS, "testing": PROPOSALS}
    return model


def padded(images):
    height, width = (32 * -(-max(image.shape[axis] for image in images) // 32) for axis in (1, 2))
    batch = images[0].new_full((len(images), 3, height, width), 9.0)  # the model has to clear the padding
    padding = torch.ones(len(images), height, width, dtype=torch.bool)
    for index, image in enumerate(images):
        batch[index, :, : image.shape[1], : image.shape[2]] = normalised(image)
        padding[index, : image.shape[1], : image.shape[2]] = False
    return batch, padding


# Detections


@torch.no_grad()
def compare(official, model, sizes):
    """A padded batch of images by `model` against torchvision's whole forward pass of each image alone, in float64.

    In float32 they differ by some 1e-4, as random weights blow rounding up.
    """
    official, model = copy.deepcopy(official).double(), quick(copy.deepcopy(model).double())
    pictures = [picture(*size, seed).double() for seed, size in enumerate(sizes)]
    predictions = model(*padded(pictures))
    assert predictions.attention is None and predictions.logits.shape == (len(sizes), 100, 91)
    scores = predictions.logits.sigmoid()
    for index, image in enumerate(pictures):
        theirs = official([image])[0]
        number = len(theirs["scores"])
        assert 10 < number < 100 and len(theirs["labels"].unique()) > 5
        torch.testing.assert_close(scores[index, :number].amax(-1), theirs["scores"], rtol=0, atol=1e-9)
        assert scores[index, :number].argmax(-1).tolist() == theirs["labels"].tolist()
        assert int((scores[index] > 0).sum()) == number  # one class each, and nothing else
        boxes = to_pixels(cxcywh_to_xyxy(predictions.boxes[index, :number]), torch.tensor(sizes[index]))
        torch.testing.assert_close(boxes, theirs["boxes"], rtol=0, atol=1e-7)


def test_a_padded_batch_gives_what_torchvision_gives_for_each_image_alone(official, model):
    compare(official[0], model, SIZES)


def test_version_2(tmp_path):
    theirs = reference(fasterrcnn_resnet50_fpn_v2, 1e-5)
    torch.save({"model": theirs.state_dict(), "epoch": 25}, tmp_path / "v2.pth")
    assert read_official(tmp_path / "v2.pth").family == "faster_rcnn_v2"
    compare(theirs, load_official(tmp_path / "v2.pth"), [(64, 80)])


@torch.no_grad()
def test_detections_are_those_that_were_found(model):
    size = (96, 120)
    predictions = model(*padded([picture(*size, 1)]))
    number = int((predictions.class_scores() > 0).sum())
    (found,) = predictions.detections(torch.tensor([size]))
    assert 0 < number < 100 and len(found.scores) == len(found.boxes) == len(found.labels) == number
    assert found.queries.tolist() == list(range(number)) and (found.scores > 0.05).all()
    (twice,) = predictions.detections(torch.tensor([(192, 360)]))
    torch.testing.assert_close(twice.boxes, found.boxes * torch.tensor([3.0, 2.0, 3.0, 2.0]), rtol=1e-5, atol=1e-4)


def test_a_query_of_score_0_is_no_detection():
    logits, boxes = torch.full((2, 3, 4), -torch.inf), torch.full((2, 3, 4), 0.5)
    logits[0, 1, 2] = 0.0
    some, none = Predictions(logits, boxes, "sigmoid").detections(torch.tensor([[10, 10], [10, 10]]))
    assert (some.scores.tolist(), some.labels.tolist(), some.queries.tolist()) == ([0.5], [2], [1])
    assert len(none.scores) == 0 and none.boxes.shape == (0, 4)


# Evaluation


def answering(model, monkeypatch, dataset, keep):
    """Let `model` find the first `keep` true boxes of every image of `dataset`, which are asked for in order."""
    targets = iter([target for _, target in dataset])

    def detect(images, sizes):
        answers = []
        for target, size in zip(targets, sizes, strict=False):
            boxes = to_pixels(cxcywh_to_xyxy(target["boxes"][:keep]), torch.tensor(size))
            answers.append((boxes, torch.linspace(0.9, 0.6, len(boxes)), target["labels"][:keep]))
        return answers

    monkeypatch.setattr(model, "_detect", detect)


@pytest.mark.parametrize("keep", [100, 1, 0])
def test_true_boxes_have_ap_1_and_padding_adds_nothing(model, monkeypatch, keep):
    cfg = load_config(None, SETTINGS | SHAPES)
    dataset = build_dataset(cfg.data, "val")
    answering(model, monkeypatch, dataset, keep)
    results, detections = evaluate(model, dataset, cfg, Accelerator(cpu=True))
    targets = [target for _, target in dataset]
    assert len(detections) == sum(min(keep, len(target["labels"])) for target in targets)
    assert "attention" not in results and "paibb" not in results
    if keep == 100:
        assert results["detection"]["AP"] == results["detection"]["AR_100"] == 1.0
        return
    alone = [
        {"image_id": t["image_id"], "category_id": int(label), "bbox": bbox, "score": 0.9}
        for t in targets
        for label, bbox in zip(t["labels"][:keep], left_top_size(t)[:keep], strict=True)
    ]
    expected = coco_ap(dataset.ground_truth, alone)
    assert results["detection"].pop("per_class") == expected.pop("per_class")
    assert results["detection"] == pytest.approx(expected, abs=1e-6)


def left_top_size(target):
    corners = to_pixels(cxcywh_to_xyxy(target["boxes"]), target["original_size"])
    return torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).tolist()


def test_from_the_published_file_to_the_tables(run_dir, model, tmp_path, monkeypatch):
    cfg = load_config(run_dir / "config.yaml")
    assert cfg.model == load_config(None, SETTINGS).model and cfg.loss == load_config().loss
    with pytest.raises(RunError, match="holds no examples; evaluate it first"):
        runs.load_examples(run_dir)
    monkeypatch.setattr(evaluation, "load_model", lambda *arguments: model)
    results = evaluate_run(run_dir)
    assert results == json.loads((run_dir / "results.json").read_text()) and results["images"] == 2
    assert "attention" not in results and "paibb" not in results
    assert all(row["score"] > 0.05 for row in json.loads((run_dir / "predictions.json").read_text()))
    tables_of(run_dir, tmp_path / "other")


def tables_of(run_dir, other):
    """What the notebooks read of the run, alone and beside one with attention."""
    detection = dict.fromkeys(("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"), 0.25)
    located = {"all": 0.5, "small": None, "medium": 0.5, "large": None, "pairs": 4}
    attention = {"decoder_cross": {"gini": [0.5, 0.7], "zeros": [0.0, 0.5]}}
    write_json(other / "results.json", {"detection": detection, "attention": attention, "paibb": located, "alpha": {}})
    for folders in ([run_dir], [run_dir, other]):
        table = frames.results_table(folders)
        assert table.loc["faster-rcnn", ["Gini", "zeros", "PAIBB"]].isna().all()
        row = markdown_table(table, dict.fromkeys(table.columns, ".3f")).splitlines()[2]
        assert row.startswith("| faster-rcnn | ") and row.endswith(" | – | – | – |")
        located = frames.paibb_table(folders)
        assert located.loc["faster-rcnn", "pairs"] == 0 and located.loc["faster-rcnn"].isna().sum() == 4
        assert set(frames.attention_frame(folders, "decoder_cross").run) == {folder.name for folder in folders[1:]}
        assert frames.final_alphas(folders) == {}
    assert table.loc["other", "Gini"] == pytest.approx(0.6)
    with pytest.raises(ValueError, match=r"no values of gini.*none of the runs has attention"):
        per_layer(frames.attention_frame([run_dir], "decoder_cross"), {"gini": "Gini"})


def test_runs_without_attention_are_left_out_of_its_pictures(tmp_path):
    write_json(tmp_path / "results.json", {"detection": {"AP": 0.5}})
    assert runs.load_examples(tmp_path) == []
    with pytest.raises(RunError, match="no run has examples with attention maps"):
        runs.same_image({"faster-rcnn": []})


# Files


def test_names_of_a_file_are_torchvisions(official, model):
    """torchvision itself reads the old names, and what is exported."""
    theirs, path = official
    for state in (torch.load(path, weights_only=True), export_official(model)):
        nn.init.zeros_(theirs.rpn.head.conv[0][0].weight)
        theirs.load_state_dict(state)
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in published(theirs).items())


def test_other_detectors_of_torchvision_are_refused(official, tmp_path):
    state = {old_name(name): torch.zeros(1).expand(value.shape) for name, value in published(official[0]).items()}
    one = torch.zeros(1)
    others = {
        "mask": (state | {"roi_heads.mask_head.mask_fcn1.weight": one}, "this is another detector"),
        "deeper": (state | {"backbone.body.layer3.22.conv1.weight": one}, "backbone is no resnet50"),
        "flat": ({k: v for k, v in state.items() if ".fpn." not in k}, "backbone is no resnet50 with a feature"),
        "hole": ({k: v for k, v in state.items() if ".fc6." not in k}, "does not fit a faster_rcnn model.*fc6"),
    }
    for name, (content, message) in others.items():
        torch.save(content, tmp_path / f"{name}.pth")
        with pytest.raises(WeightsError, match=rf"{name}\.pth: .*{message}"):
            load_official(tmp_path / f"{name}.pth")


def test_size_and_norms_are_those_of_published_weights(model):
    """torchvision counts 41,755,286 parameters in its weights of version 1, all of which belong to no batch norm."""
    weights = FasterRCNN_ResNet50_FPN_Weights.COCO_V1
    assert sum(parameter.numel() for parameter in model.parameters()) == weights.meta["num_params"]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert {module.eps for module in model.modules() if isinstance(module, FrozenBatchNorm2d)} == {0.0}


# Settings


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"model.backbone.weights": "imagenet"}, r"model\.backbone: .*set model\.backbone\.weights to none"),
        ({"model.backbone.name": "resnet18"}, "torchvision's resnet50"),
        ({"model.attention.decoder_cross": "sparsemax"}, r"model\.attention is of no use.*no transformer"),
        ({"model.hidden_dim": 128}, r"model\.hidden_dim is of no use"),
        ({"model.classification": "sigmoid"}, r"model\.classification is of no use"),
        ({"model.deformable.levels": 1}, r"model\.deformable is of no use to model\.architecture faster_rcnn"),
        ({"data.contiguous": True}, r"data\.contiguous: class 0 .* background"),
        ({"train.precision": "bfloat16"}, r"train\.precision: .*set it to float32"),
    ],
)
def test_settings_that_mean_nothing_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, SETTINGS | overrides)


def test_training_is_refused_before_anything_is_written(tmp_path):
    cfg = load_config(None, SETTINGS | SHAPES | {"data.root": "nowhere"})
    for start in (train, lambda cfg, run_dir: launch(cfg, run_dir, gpus=0, processes=2)):
        with pytest.raises(ConfigError, match=r"not to be trained.*_FPN_Weights\.COCO_V1.*checkpoints FILE --as"):
            start(cfg, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="FPN_V2_Weights"):
        train(replace(cfg, {"model.architecture": "faster_rcnn_v2"}), tmp_path / "run")
