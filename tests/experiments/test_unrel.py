"""UnRel's .mat file as Matlab lays it out, read and converted: coordinates, ids, relationships, faults."""

import json
import re

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat, savemat

from detrlib.data import CocoDataset
from detrlib.errors import DataError
from detrlib.experiments import unrel
from detrlib.experiments.unrel import COCO_IDS, coco_name, convert_unrel, read_mat, summary
from detrlib.metrics.detection import coco_ap

MAPPED = {  # the 29 of UnRel's 48 names that are classes of COCO, with COCO's ids
    **{"person": 1, "bike": 2, "car": 3, "motorcycle": 4, "plane": 5, "bus": 6, "train": 7, "truck": 8, "boat": 9},
    **{"traffic light": 10, "bench": 15, "cat": 17, "dog": 18, "horse": 19, "elephant": 22, "giraffe": 25},
    **{"umbrella": 28, "bag": 31, "tie": 32, "suitcase": 33, "ball": 37, "skateboard": 41, "surfboard": 42},
    **{"chair": 62, "sofa": 63, "bed": 65, "table": 67, "phone": 77, "refrigerator": 82},
}
FIRST_SEEN = (  # UnRel's 48 names in order of appearance
    "person bike building wheel car road tree bus truck elephant dog cat skateboard horse tie hat cone shoes "
    "sunglasses shirt helmet motorcycle pants jacket umbrella glasses sofa chair table bed refrigerator traffic_light "
    "boat giraffe suitcase cart bench plane box trees train watch ball roof surfboard coat bag phone"
)
FIRST_SEEN = [name.replace("_", " ") for name in FIRST_SEEN.split()]


def cell(elements):
    """A Matlab cell of n x 1."""
    made = np.empty((len(elements), 1), dtype=object)
    for place, element in enumerate(elements):
        made[place, 0] = element
    return made


def row(box):
    """A row vector in the smallest type that holds it, as Matlab compresses whole numbers."""
    return np.array([box], dtype=np.min_scalar_type(max(box))) if len(box) else np.zeros((0, 0))


def relation(subject, predicates, other):
    (sub, sub_box), (obj, obj_box) = subject, other
    return {"sub": sub, "obj": obj, "sub_box": row(sub_box), "obj_box": row(obj_box), "rels": cell(predicates)}


def photograph(id, found, relations=(), **replaced):
    """found: (category, (xmin, ymin, xmax, ymax)); relations: (subject's place, predicate, object's place)."""
    return {
        "filename": f"{id}.png",
        "im_id": id,
        "relationships": cell([relation(found[i], [predicate], found[j]) for i, predicate, j in relations]),
        "objects": cell([{"category": category, "box": row(box)} for category, box in found]),
    } | replaced


@pytest.fixture
def write(tmp_path):
    """`write([photographs], size)` makes annotations.mat and pictures; returns the arguments of the conversion."""

    def make(photographs, size=(60, 40)):
        (tmp_path / "images").mkdir(exist_ok=True)
        for one in photographs:
            Image.new("RGB", size, (120, 90, 40)).save(tmp_path / "images" / str(one["filename"]))
        savemat(tmp_path / "annotations.mat", {"annotations": cell(photographs)})
        return tmp_path / "annotations.mat", tmp_path / "images", tmp_path / "unrel.json"

    return make


def converted(arguments, **options):
    info = convert_unrel(*arguments, **options)
    content = json.loads(arguments[2].read_text())
    assert content["info"] == info
    return content


TWO = [
    photograph(
        7,
        [("person", (1, 1, 60, 40)), ("hat", (3, 5, 8, 9)), ("bike", (250, 2, 255, 30)), ("bike", (10, 20, 30, 40))],
        [(0, "wear", 1), (0, "above", 3)],
    ),
    photograph(12, [("sofa", (31, 11, 60, 40))]),
]


# --- names -----------------------------------------------------------------------------------------------------


def test_names_of_coco_and_which_of_unrel_are_among_them():
    assert len(FIRST_SEEN) == len(set(FIRST_SEEN)) == 48 and len(COCO_IDS) == len(set(COCO_IDS.values())) == 80
    assert {name: COCO_IDS[coco_name(name)] for name in FIRST_SEEN if coco_name(name)} == MAPPED
    assert len(MAPPED) == 29 and set(unrel.SAME_CLASS) | set(unrel.NARROWER) <= set(FIRST_SEEN)


def test_names_of_coco_are_those_of_a_real_file(shared_data):
    content = json.loads((shared_data / "coco_mini/annotations/instances_val2017.json").read_text())
    assert {category["name"]: category["id"] for category in content["categories"]} == COCO_IDS


def test_names_of_unrel_are_those_of_the_real_file(shared_data):
    assert json.loads((shared_data / "unrel_facts.json").read_text())["categories48_in_first_seen_order"] == FIRST_SEEN


# --- reading ---------------------------------------------------------------------------------------------------


def test_the_fixture_is_laid_out_as_matlab_does(write):
    """Cells of 1 x 1 structures whose small numbers are stored as bytes."""
    mat, *_ = write(TWO)
    entries = loadmat(mat)["annotations"]
    assert entries.shape == (2, 1) and entries[0, 0].dtype.names == ("filename", "im_id", "relationships", "objects")
    assert entries[0, 0]["objects"].item().shape == (4, 1)
    box = entries[0, 0]["objects"].item()[3, 0]["box"].item()
    assert box.shape == (1, 4) and box.dtype == np.uint8


def sides(photograph):
    return [(one.sub, one.sub_box, one.obj, one.obj_box, one.rels) for one in photograph.relationships]


@pytest.mark.parametrize("count", [1, 2])
def test_one_photograph_object_or_relationship_is_read_like_several(write, count):
    objects = [("cat", (1, 2, 3, 4)), ("tie", (5, 6, 7, 8))]
    relations = [(0, "wear", 1), (1, "below", 0)]
    photographs = [photograph(id, objects[:count], relations[: count - 1]) for id in range(count)]
    read = read_mat(write(photographs)[0])
    assert [one.im_id for one in read] == list(range(count)) and read[0].filename == "0.png"
    assert all([(found.category, found.box) for found in one.objects] == objects[:count] for one in read)
    expected = [(*objects[i], *objects[j], [predicate]) for i, predicate, j in relations[: count - 1]]
    assert all(sides(one) == expected for one in read)


def test_several_predicates_of_a_pair_and_sides_without_a_box(write):
    pair = relation(("dog", (1, 1, 9, 9)), ["ride", "on top of"], ("bike", ()))
    (read,) = read_mat(write([photograph(1, [("dog", (1, 1, 9, 9))], relationships=cell([pair]))])[0])
    assert sides(read) == [("dog", (1, 1, 9, 9), "bike", None, ["ride", "on top of"])]


DOG = {"category": "dog", "box": row((1, 2, 3, 4))}


@pytest.mark.parametrize(
    "photographs, place",
    [
        ([{"filename": "1.png", "im_id": 1, "objects": cell([DOG])}], "annotations(1).relationships"),
        ([TWO[0], photograph(1, [], im_id="x")], "annotations(2).im_id"),
        ([photograph(1, [], im_id=-1)], "annotations(1).im_id"),
        ([photograph(1, [], filename=3.0)], "annotations(1).filename"),
        ([photograph(1, [], objects=cell([DOG, {"category": "dog"}]))], "annotations(1).objects(2).box"),
        ([photograph(1, [], objects=cell([DOG | {"box": row((1, 2, 3))}]))], "annotations(1).objects(1).box"),
        ([photograph(1, [], objects=cell([DOG | {"category": 4}]))], "annotations(1).objects(1).category"),
        ([photograph(1, [], objects=cell(["dog"]))], "annotations(1).objects(1)"),
        ([photograph(1, [], relationships=cell([{"sub": "dog"}]))], "annotations(1).relationships(1).sub_box"),
        ([TWO[0], TWO[0]], "im_id 7 occurs twice"),
        ([], "annotations: "),
    ],
)
def test_faults_are_named_with_file_entry_and_field(tmp_path, photographs, place):
    path = tmp_path / "annotations.mat"
    savemat(path, {"annotations": cell(photographs)})
    with pytest.raises(DataError, match=re.escape(f"{path}: {place}")):
        read_mat(path)


def test_files_that_are_not_unrels(tmp_path):
    with pytest.raises(DataError, match=r"a\.mat: "):
        read_mat(tmp_path / "a.mat")
    savemat(tmp_path / "a.mat", {"triplets": 1})
    with pytest.raises(DataError, match=r"a\.mat: annotations: .*triplets"):
        read_mat(tmp_path / "a.mat")
    (tmp_path / "a.mat").write_bytes(b"<html>404</html>" * 40)
    with pytest.raises(DataError, match=r"a\.mat: not readable"):
        read_mat(tmp_path / "a.mat")
    for compressed in (False, True):
        savemat(tmp_path / "b.mat", {"annotations": cell([TWO[0]])}, do_compression=compressed)
        (tmp_path / "b.mat").write_bytes((tmp_path / "b.mat").read_bytes()[:300])
        with pytest.raises(DataError, match=r"b\.mat: not readable"):
            read_mat(tmp_path / "b.mat")
    header = b"MATLAB 7.3 MAT-file".ljust(124, b" ") + (0x0200).to_bytes(2, "little") + b"IM"
    (tmp_path / "c.mat").write_bytes(header + bytes(600))
    with pytest.raises(DataError, match=r"c\.mat: .*-v7"):
        read_mat(tmp_path / "c.mat")


# --- converting ------------------------------------------------------------------------------------------------


def test_pixels_counted_from_one_become_edges_counted_from_zero(write):
    content = converted(write(TWO))
    boxes = [annotation["bbox"] for annotation in content["annotations"]]
    assert boxes == [[0, 0, 60, 40], [9, 19, 21, 21], [30, 10, 30, 30]]  # the whole image; a quarter of it
    assert [annotation["area"] for annotation in content["annotations"]] == [2400, 441, 900]
    assert content["info"]["without_area"] == 1  # the bike beyond the right edge


def test_pixels_of_a_drawn_box_are_those_that_the_converted_box_covers(tmp_path, write):
    """In the picture itself: every pixel with xmin <= x <= xmax, counted from 1, lies inside, all others outside."""
    arguments = write([photograph(1, [("dog", (11, 6, 25, 30))])])
    pixels = np.zeros((40, 60, 3), dtype=np.uint8)
    rows, columns = np.mgrid[1:41, 1:61]
    pixels[(rows >= 6) & (rows <= 30) & (columns >= 11) & (columns <= 25)] = 255
    Image.fromarray(pixels).save(arguments[1] / "1.png")
    convert_unrel(*arguments)
    dataset = CocoDataset(arguments[1], arguments[2], strict=True)
    left, top, right, bottom = dataset.objects(0)[0][0].int().tolist()
    picture = np.asarray(dataset.image(0))
    assert (picture[top:bottom, left:right] == 255).all() and picture.sum() == 255 * 3 * (bottom - top) * (right - left)


def test_ids_names_and_what_was_left_out(write):
    content = converted(write([*TWO, photograph(3, [("ball", (1, 1, 9, 9)), ("ball", (1, 1, 9, 9))])]))
    assert [annotation["id"] for annotation in content["annotations"]] == [1, 2, 3, 4]
    assert [annotation["category_id"] for annotation in content["annotations"]] == [1, 2, 63, 37]
    assert [annotation["image_id"] for annotation in content["annotations"]] == [7, 7, 12, 3]
    assert {category["id"]: category["name"] for category in content["categories"]} == {
        **{1: "person", 2: "bicycle", 37: "sports ball", 63: "couch"}
    }
    info = content["info"]
    assert info["objects"] == {"ball": 1, "bike": 1, "person": 1, "sofa": 1} and info["unmapped"] == {"hat": 1}
    assert (info["repeated"], info["without_area"], info["judgement_calls"]) == (1, 1, {"ball": "sports ball"})
    assert all((image["width"], image["height"]) == (60, 40) for image in content["images"])


def test_relationships_point_to_annotations_where_there_are_any(write):
    first, second = converted(write(TWO))["images"]
    person = {"subject": "person", "subject_id": 1, "subject_box": [0, 0, 60, 40]}
    assert first["relationships"] == [
        person | {"predicate": "wear", "object": "hat", "object_id": None, "object_box": [2, 4, 6, 5]},
        person | {"predicate": "above", "object": "bike", "object_id": 2, "object_box": [9, 19, 21, 21]},
    ]
    assert second["relationships"] == []


def test_an_unmapped_object_may_excuse_detections_on_it(write):
    arguments = write([photograph(1, [("dog", (1, 1, 10, 10)), ("building", (31, 1, 60, 40))]), TWO[1]])
    found = {"image_id": 1, "category_id": 18, "bbox": [0, 0, 10, 10], "score": 0.5}
    couch = {"image_id": 12, "category_id": 63, "bbox": [30, 10, 30, 30], "score": 0.5}
    on_the_building = found | {"bbox": [35, 5, 20, 20], "score": 0.9}
    aside = found | {"bbox": [0, 20, 20, 20], "score": 0.9}
    for unmapped, extra, ap in [
        ("drop", on_the_building, 0.75),
        ("ignore", on_the_building, 1.0),
        ("ignore", aside, 0.75),
    ]:
        content = converted(arguments, unmapped=unmapped)
        assert coco_ap(content, [found, couch, extra])["AP"] == pytest.approx(ap)
    assert [a["category_id"] for a in content["annotations"] if a["iscrowd"]] == [18, 63]
    assert content["info"]["unmapped_are"] == "ignored"


def test_the_numbering_of_the_thesis_is_kept_with_its_faults(write):
    """Ids by first appearance, annotations from 0, Matlab's corner as it is, a pixel less in each direction."""
    boxes = [(name, (2 + k, 3, 12 + k, 33)) for k, name in enumerate(FIRST_SEEN)]
    content = converted(write([photograph(9, boxes[:3]), photograph(4, [boxes[1], *boxes[3:]])]), ids="thesis")
    assert [category["name"] for category in content["categories"]] == FIRST_SEEN
    assert [category["id"] for category in content["categories"]] == list(range(1, 49))
    assert [annotation["id"] for annotation in content["annotations"]] == list(range(49))
    assert [annotation["category_id"] for annotation in content["annotations"]] == [1, 2, 3, 2, *range(4, 49)]
    assert [annotation["bbox"] for annotation in content["annotations"][:4]] == [
        *([2, 3, 10, 30], [3, 3, 10, 30], [4, 3, 10, 30], [3, 3, 10, 30])
    ]
    assert all(type(v) is int for annotation in content["annotations"] for v in annotation["bbox"])
    assert {annotation["area"] for annotation in content["annotations"]} == {300}
    assert content["info"]["unmapped"] == {} and content["info"]["judgement_calls"] == {}


def test_pictures_that_are_missing_or_broken(write):
    mat, images, out = write(TWO)
    (images / "12.png").write_bytes((images / "12.png").read_bytes()[:60])
    assert converted((mat, images, out))["info"]["unreadable"] == ["12.png"]
    assert CocoDataset(images, out).image_ids == [7]
    (images / "7.png").unlink()
    with pytest.raises(DataError, match=r"images/7\.png"):
        convert_unrel(mat, images, out)
    (images / "7.png").write_text("x")
    with pytest.raises(DataError, match=r"images: .*7\.png"):
        convert_unrel(mat, images, out)


def test_nothing_to_convert_and_unknown_choices(write):
    arguments = write([photograph(1, [("roof", (1, 1, 5, 5))])])
    with pytest.raises(DataError, match=r"annotations\.mat: .*roof"):
        convert_unrel(*arguments)
    with pytest.raises(DataError, match="ids='COCO'"):
        convert_unrel(*arguments, ids="COCO")


def test_a_summary_says_what_was_written_and_left_out(write):
    arguments = write(TWO)
    shown = summary(arguments[2], convert_unrel(*arguments))
    assert f"{arguments[2]}: 2 images, 3 annotations of 3 classes" in shown
    assert "left out, no class of COCO: hat 1" in shown and "without area 1" in shown


# --- what is known of the real file ----------------------------------------------------------------------------


def test_eleven_photographs_of_the_real_file(shared_data, tmp_path):
    """Their objects and relationships as printed in public notebooks, on photographs of COCO resized to their sizes."""
    samples = json.loads((shared_data / "unrel_facts.json").read_text())["samples"]
    pictures = sorted((shared_data / "coco_mini" / "train2017").iterdir())
    (tmp_path / "images").mkdir()
    photographs = []
    for sample, path in zip(samples, pictures[: len(samples)], strict=True):
        with Image.open(path) as picture:
            picture.resize((sample["width"], sample["height"])).save(tmp_path / "images" / sample["filename"])
        objects = [(found["category"], tuple(found["box"])) for found in sample["objects"]]
        made = photograph(sample["im_id"], objects, sample["relationships"] or (), filename=sample["filename"])
        photographs.append(made)
    savemat(tmp_path / "annotations.mat", {"annotations": cell(photographs)})
    arguments = tmp_path / "annotations.mat", tmp_path / "images", tmp_path / "unrel.json"
    content = converted(arguments)
    info = content["info"]
    assert sum(info["objects"].values()) + sum(info["unmapped"].values()) == sum(len(s["objects"]) for s in samples)
    assert info["unmapped"] == {"building": 1, "shirt": 1, "shoes": 4, "tree": 1, "wheel": 4}
    assert (info["without_area"], info["repeated"]) == (0, 0)
    for annotation in content["annotations"]:
        image = next(image for image in content["images"] if image["id"] == annotation["image_id"])
        x, y, width, height = annotation["bbox"]
        assert min(x, y) >= 0 and x + width <= image["width"] and y + height <= image["height"]
    refrigerator = next(a for a in content["annotations"] if a["category_id"] == 82)
    assert refrigerator["bbox"] == [2, 0, 272, 419]  # up to the right edge of an image 274 pixels wide
    relationships = {image["id"]: image["relationships"] for image in content["images"]}
    assert [(r["subject"], r["predicate"], r["object"]) for r in relationships[663]] == [("person", "hold", "car")] * 2
    dataset = CocoDataset(*arguments[1:], strict=True)
    perfect = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.9}
        for a in content["annotations"]
    ]
    assert coco_ap(dataset.ground_truth, perfect)["AP"] == pytest.approx(1)
