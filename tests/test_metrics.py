"""Metrics against published numbers, against independent computations, and against what must not matter."""

import contextlib
import copy
import io
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from detrlib.boxes import xyxy_to_cxcywh
from detrlib.metrics.detection import METRICS, coco_ap, coco_detections
from detrlib.metrics.localisation import object_size, paibb
from detrlib.metrics.sparsity import entropy, gini, support_size, zeros_ratio

CASES = Path(__file__).parents[2] / "shared" / "data" / "coco_eval_cases"


# Detection


PUBLISHED = [
    ("cocoapi_val2014_100", "instances_val2014_100.json", "instances_val2014_fakebbox100_results.json", 0.0),
    ("detectron2_mini", "gt.json", "detections.json", 0.0),
    ("faster_coco_eval", "gt_ignore_test.json", "dt_ignore_test.json", 0.1),
]


@pytest.mark.parametrize(("case", "truth", "detections", "lowest_score"), PUBLISHED)
def test_published_ap(case, truth, detections, lowest_score):
    folder = CASES / case
    if not folder.is_dir():
        pytest.skip(f"published evaluation cases are not at {CASES}")
    reference = json.loads((folder / "expected.json").read_text())
    kept = [one for one in json.loads((folder / detections).read_text()) if one["score"] >= lowest_score]
    result = coco_ap(folder / truth, kept)
    expected = {name: reference["expected"][name] for name in METRICS}
    assert {name: result[name] for name in METRICS} == pytest.approx(expected, rel=0, abs=reference["tolerance"])


def test_every_published_case_is_tested():
    if not CASES.is_dir():
        pytest.skip(f"published evaluation cases are not at {CASES}")
    tested = {case for case, *_ in PUBLISHED}
    assert tested == {path.parent.name for path in CASES.glob("*/expected.json")}


def random_detection_task(seed: int, first_annotation: int = 1) -> tuple[dict, list[dict]]:
    """Ground truth with crowds, an empty image and a class without objects; detections near and far from it."""
    random = np.random.default_rng(seed)
    images = [{"id": 10 + i, "height": 400, "width": 400} for i in range(12)]
    categories = [{"id": i, "name": name} for i, name in [(3, "ant"), (4, "bee"), (9, "cat"), (11, "unused")]]
    annotations, detections = [], []
    for image in images[1:]:
        for _ in range(random.integers(1, 7)):
            side = random.choice([15, 60, 150])
            box = np.concatenate([random.uniform(0, 240, 2), side * random.uniform(0.7, 1.3, 2)])
            category = int(random.choice([3, 4, 9]))
            annotations.append(
                {
                    "id": first_annotation + len(annotations),
                    "image_id": image["id"],
                    "category_id": category,
                    "bbox": box.tolist(),
                    "area": float(0.8 * box[2] * box[3]),
                    "iscrowd": int(random.random() < 0.1),
                }
            )
            for _ in range(random.integers(0, 4)):
                moved = box + random.normal(0, 0.08 * side, 4)
                corners = np.concatenate([moved[:2], moved[:2] + np.abs(moved[2:])])
                guess = category if random.random() < 0.8 else int(random.choice([3, 4, 9, 11]))
                detections += coco_detections(image["id"], corners[None], [random.random()], [guess])
    return {"images": images, "categories": categories, "annotations": annotations}, detections


def pycocotools_stats(truth: dict, detections: list[dict]):
    coco, cocoeval = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")
    with contextlib.redirect_stdout(io.StringIO()):
        reference = coco.COCO()
        reference.dataset = copy.deepcopy(truth)
        reference.createIndex()
        evaluation = cocoeval.COCOeval(reference, reference.loadRes(copy.deepcopy(detections)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("seed", range(5))
def test_ap_agrees_with_pycocotools(seed, capsys):
    truth, detections = random_detection_task(seed)
    given = copy.deepcopy((truth, detections))
    result = coco_ap(truth, detections)
    assert (truth, detections) == given
    assert capsys.readouterr() == ("", "")
    evaluation = pycocotools_stats(truth, detections)
    assert [result[name] for name in METRICS] == pytest.approx(evaluation.stats.tolist(), abs=1e-12)
    assert 0.1 < result["AP"] < 0.9  # neither trivial end

    for position, name in enumerate(["ant", "bee", "cat", "unused"]):
        precision = evaluation.eval["precision"][:, :, position, 0, -1]
        expected = precision.mean() if name != "unused" else -1
        assert result["per_class"][name]["AP"] == pytest.approx(expected)
        assert result["per_class"][name]["AP50"] == pytest.approx(precision[0].mean())


def test_ap_does_not_depend_on_annotation_ids():
    assert coco_ap(*random_detection_task(0, first_annotation=0)) == coco_ap(*random_detection_task(0))


def test_ap_without_detections_is_zero_where_there_is_ground_truth():
    truth, _ = random_detection_task(1)
    truth["annotations"] = [one | {"area": 50.0} for one in truth["annotations"]]
    result = coco_ap(truth, [])
    assert (result["AP"], result["AP_small"], result["AR_100"]) == (0, 0, 0)
    assert (result["AP_medium"], result["AR_large"]) == (-1, -1)
    assert result["per_class"] == {
        "ant": {"AP": 0, "AP50": 0},
        "bee": {"AP": 0, "AP50": 0},
        "cat": {"AP": 0, "AP50": 0},
        "unused": {"AP": -1, "AP50": -1},
    }


def test_ap_without_any_object_is_undefined():
    truth, detections = random_detection_task(2)
    result = coco_ap(truth | {"annotations": []}, detections)
    assert {result[name] for name in METRICS} == {-1}


def test_detections_of_an_unknown_image_are_refused():
    truth, _ = random_detection_task(0)
    with pytest.raises(ValueError, match="not in the ground truth, such as 999"):
        coco_ap(truth, coco_detections(999, [[0, 0, 5, 5]], [0.5], [3]))


def test_detections_hold_plain_numbers():
    one, two = coco_detections(7, torch.tensor([[1.0, 2, 4, 8], [0, 0, 1, 1]]), torch.tensor([0.5, 0.25]), [3, 9])
    assert one == {"image_id": 7, "category_id": 3, "bbox": [1, 2, 3, 6], "score": 0.5}
    assert json.loads(json.dumps(two)) == two
    assert coco_detections(7, torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long)) == []
    with pytest.raises(ValueError, match="shorter"):
        coco_detections(7, torch.zeros(2, 4), torch.zeros(2), torch.zeros(1))


# Sparsity

METRICS_OF_WEIGHTS = [gini, zeros_ratio, support_size, entropy]


def sparse_weights(*shape: int, seed: int = 0) -> torch.Tensor:
    """Rows that sum to one, about half of whose entries are exact zeros."""
    raw = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).relu() + 1e-8 * torch.eye(shape[-1])[0]
    return raw / raw.sum(-1, keepdim=True)


def test_uniform_and_one_hot():
    uniform, one_hot = torch.full((50,), 1 / 50), torch.eye(50)[17]
    assert gini(uniform).item() == pytest.approx(0, abs=1e-6)
    assert gini(one_hot).item() == pytest.approx(1 - 1 / 50)
    assert (zeros_ratio(uniform).item(), zeros_ratio(one_hot).item()) == (0, pytest.approx(49 / 50))
    assert (support_size(uniform).item(), support_size(one_hot).item()) == (50, 1)
    assert (entropy(uniform).item(), entropy(one_hot).item()) == (pytest.approx(np.log(50)), 0)


def test_gini_is_the_mean_difference_of_pairs():
    weights = sparse_weights(3, 4, 37)
    pairs = (weights[..., :, None] - weights[..., None, :]).abs().sum((-1, -2))
    keys = weights.shape[-1]
    over_pairs = pairs / (2 * (keys**2 - keys) * weights.mean(-1))
    torch.testing.assert_close(gini(weights) * keys / (keys - 1), over_pairs)


def test_gini_of_known_distributions():
    """1/3 for the uniform and 1/2 for the exponential distribution, at their mid-quantiles."""
    quantiles = (torch.arange(1000) + 0.5) / 1000
    assert gini(quantiles).item() == pytest.approx(1 / 3, abs=1e-3)
    assert gini(-torch.log1p(-quantiles)).item() == pytest.approx(1 / 2, abs=1e-3)


@pytest.mark.parametrize("metric", METRICS_OF_WEIGHTS)
def test_padding_is_dropping_the_columns(metric):
    weights = sparse_weights(2, 3, 5, 20)
    valid = torch.arange(20) % 3 != 1
    valid = torch.stack([valid, valid.flip(0)])[:, None, None]  # [B, 1, 1, K], another mask for each image
    filled = weights.masked_fill(~valid, 0.7)  # what padded keys hold must not matter
    for image in range(2):
        dropped = metric(weights[image][..., valid[image, 0, 0]])
        torch.testing.assert_close(metric(filled, valid)[image], dropped)


@pytest.mark.parametrize("metric", METRICS_OF_WEIGHTS)
def test_scale_and_order_do_not_matter(metric):
    weights = sparse_weights(4, 30)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(metric(3 * weights[:, order]), metric(weights))


@pytest.mark.parametrize("metric", METRICS_OF_WEIGHTS)
def test_rows_without_weight_or_keys(metric):
    weights = torch.stack([torch.zeros(6), torch.full((6,), 1 / 6)])
    nothing_valid = torch.tensor([[True] * 6, [False] * 6])
    expected = 1.0 if metric is zeros_ratio else 0.0  # a row of zeros does consist of zeros
    assert metric(weights, nothing_valid).tolist() == [expected, 0]
    assert metric(weights.half()).dtype == torch.float32


def test_zeros_ratio_threshold_is_inclusive():
    weights = torch.tensor([0.0, 1e-6, 1e-3, 0.999])
    ratios = [zeros_ratio(weights, threshold=threshold).item() for threshold in (0, 1e-6, 1e-3)]
    assert ratios == [0.25, 0.5, 0.75]


# Localisation


def random_maps(n: int, h: int, w: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, h, w, generator=torch.Generator().manual_seed(seed)) ** 4


def test_paibb_agrees_with_brute_force_enlargement():
    """An independent computation: enlarge the map 64 times and count pixels."""
    factor, (h, w), extent = 64, (5, 7), (4.5, 6.75)
    maps = random_maps(6, h, w)
    image = interpolate(maps[None].double(), (h * factor, w * factor), mode="bilinear")[0]
    rows, columns = int(extent[0] * factor), int(extent[1] * factor)  # the rest is beyond the image
    image = image[:, :rows, :columns]
    corners = torch.tensor(
        [[0, 0, 20, 30], [1, 250, 431, 287], [100, 90, 101, 91], [3, 3, 432, 288], [200, 7, 300, 8], [31, 33, 97, 160]]
    )
    boxes = xyxy_to_cxcywh(corners.double() / torch.tensor([columns, rows, columns, rows]))
    expected = [page[y0:y1, x0:x1].sum() / page.sum() for page, (x0, y0, x1, y1) in zip(image, corners, strict=True)]
    # Pixels average f with an error of second order in 1 / factor, at the kinks only.
    torch.testing.assert_close(paibb(maps, boxes, extent), torch.stack(expected).float(), rtol=2e-3, atol=1e-7)


def test_paibb_of_the_whole_image_and_beyond_is_one():
    maps = random_maps(2, 4, 6)
    boxes = torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.4, 0.6, 3.0, 3.0]])
    torch.testing.assert_close(paibb(maps, boxes, (3.2, 5.9)), torch.ones(2))


def test_paibb_of_uniform_attention_is_the_share_of_area():
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.3], [0.1, 0.9, 0.001, 0.002], [0.0, 0.0, 0.5, 0.5]])
    inside_image = torch.tensor([0.06, 2e-6, 0.0625])
    torch.testing.assert_close(paibb(torch.ones(3, 5, 8), boxes, (4.3, 8.0)), inside_image)


def test_paibb_adds_up_over_a_partition():
    cuts_x, cuts_y = [0, 0.13, 0.5001, 0.9, 1], [0, 0.333, 0.334, 1]
    corners = [(x0, y0, x1, y1) for x0, x1 in pairwise(cuts_x) for y0, y1 in pairwise(cuts_y)]
    maps = random_maps(1, 3, 9).expand(len(corners), -1, -1)
    shares = paibb(maps, xyxy_to_cxcywh(torch.tensor(corners)), (2.5, 8.25))
    assert shares.min() > 0
    assert shares.sum().item() == pytest.approx(1)


def test_paibb_of_degenerate_input():
    whole = torch.tensor([[0.5, 0.5, 1.0, 1.0]])
    assert paibb(torch.zeros(1, 3, 3), whole, (3, 3)).tolist() == [0]
    assert paibb(torch.ones(1, 3, 3), torch.tensor([[0.5, 0.5, 0.0, 1.0]]), (3, 3)).tolist() == [0]
    assert paibb(torch.ones(1, 1, 1), torch.tensor([[0.5, 0.5, 0.5, 0.2]]), (1, 1)).item() == pytest.approx(0.1)
    assert paibb(torch.zeros(0, 3, 3), torch.zeros(0, 4), (3, 3)).shape == (0,)
    with pytest.raises(ValueError, match="does not fit"):
        paibb(torch.ones(1, 3, 3), whole, (3, 3.5))


@pytest.mark.parametrize(
    ("area", "size"),
    [(0, "small"), (1023.9, "small"), (1024, "medium"), (9216, "medium"), (9216.1, "large"), (1e6, "large")],
)
def test_object_size(area, size):
    assert object_size(area) == size
