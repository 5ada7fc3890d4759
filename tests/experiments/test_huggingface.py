"""The table of zeros: what it measures, of which weights, and that the models are left as they were."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from detrlib.attention import TRANSFORMS
from detrlib.checkpoints.adapted import write_adapted
from detrlib.checkpoints.source import Source
from detrlib.config import load_config
from detrlib.config.huggingface import KINDS
from detrlib.errors import ConfigError, DataError, WeightsError
from detrlib.experiments import huggingface
from detrlib.experiments.huggingface import SHARPEN, measure, open_detector, sparsity_table, wide_table
from detrlib.metrics.sparsity import zeros_ratio
from detrlib.models import build_model

transformers = pytest.importorskip("transformers")
IMAGE = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def tiny_models(monkeypatch, huggingface_settings):
    """Types open as small detectors."""

    def small(overrides):
        settings = huggingface_settings(overrides["model"]["type"])["model"] | overrides["model"]
        return load_config(overrides=overrides | {"model": settings})

    monkeypatch.setattr(huggingface, "load_config", small)


@pytest.fixture
def trained(tmp_path, huggingface_settings):
    """A folder of weights, as `from_pretrained` reads it, of a detector that saw pictures of a size of its own."""
    torch.manual_seed(0)
    cfg = load_config(overrides=huggingface_settings("detr") | {"data.image_size": 96})
    model = build_model(cfg.model)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.weight.normal_(0, 0.2)
    write_adapted(Source("theirs", cfg, model.state_dict(), None, tmp_path), tmp_path)
    return tmp_path


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "wide.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)).save(path)
    return path


def test_every_site_under_every_transform(tiny_models):
    table = sparsity_table(["detr", "rt_detr_v2"], size=128, alpha=1.25)
    assert len(table) == 2 * 3 * len(TRANSFORMS)
    rows = table.set_index(["model", "site", "transform"])
    keys = rows["keys"].groupby(level=[0, 1]).first()
    assert keys["detr"].to_dict() == {"encoder_self": 16, "decoder_self": 11, "decoder_cross": 16}
    assert keys["rt_detr_v2"].to_dict() == {"encoder_self": 16, "decoder_self": 11, "decoder_cross": 12}
    grids = {("detr", "encoder_self"), ("detr", "decoder_cross"), ("rt_detr_v2", "encoder_self")}
    for (model, site), zeros in rows["zeros"].groupby(level=[0, 1]):
        by_name = zeros[model, site]
        assert by_name["softmax"] < 0.01 < by_name["entmax"] < by_name["entmax15"] < by_name["sparsemax"] < 1
        assert pd.notna(by_name["tvmax"]) == ((model, site) in grids)
        assert by_name["alpha_entmax"] == pytest.approx(by_name["entmax15"], abs=1e-3)  # where it starts


def test_measured_are_the_weights_that_the_model_returns(huggingface_detector):
    model = huggingface_detector("detr")
    found = measure(model, {"pixel_values": IMAGE}, "sparsemax", "encoder_self")
    with huggingface.use("sparsemax", model, "encoder_self"), torch.no_grad():
        maps = torch.stack(model(IMAGE, output_attentions=True).encoder_attentions)
    assert found["zeros"] == pytest.approx(zeros_ratio(maps).mean().item(), abs=1e-5)
    assert found["keys"] == 16


def test_padding_counts_neither_as_zero_nor_as_a_key(huggingface_detector):
    model, mask = huggingface_detector("detr"), torch.ones(1, 128, 128, dtype=torch.long)
    mask[:, :, 64:] = 0
    found = measure(model, {"pixel_values": IMAGE, "pixel_mask": mask}, "softmax", "decoder_cross")
    assert found["keys"] == 8
    assert found["zeros"] == pytest.approx(0, abs=1e-6)


def test_sharpening_gives_scores_their_spread(huggingface_detector):
    model, inputs = huggingface_detector("detr"), {"pixel_values": IMAGE}

    def found(sharpen):
        return measure(model, inputs, "sparsemax", "encoder_self", sharpen)["zeros"]

    assert found(0.1) < found(1.0) < found(8.0)
    before = found(None), found(SHARPEN)
    with torch.no_grad():
        for layer in model.model.encoder.layers:
            for parameter in layer.self_attn.q_proj.parameters():
                parameter.mul_(7)
    assert found(None) > before[0] + 0.1
    assert found(SHARPEN) == pytest.approx(before[1], abs=1e-3)  # the scale of the weights makes no difference


def test_a_model_is_left_as_it_was(huggingface_detector):
    model = huggingface_detector("dab-detr")
    classes = [type(module) for module in model.modules()]
    measure(model, {"pixel_values": IMAGE}, "alpha_entmax", "decoder_self", 2.0)
    with pytest.raises(ValueError, match="channel"):
        measure(model, {"pixel_values": IMAGE[:, :1]}, "alpha_entmax", "decoder_self")
    assert [type(module) for module in model.modules()] == classes


def test_trained_weights_are_taken_as_they_are_and_see_pictures(trained, picture):
    table = sparsity_table([str(trained)], ["sparsemax"], pictures=[picture]).set_index("site")
    assert table["keys"]["encoder_self"] == 3 * 5  # 96 x 144 pixels
    inputs = transformers.AutoImageProcessor.from_pretrained(trained)(images=Image.open(picture), return_tensors="pt")
    theirs = transformers.AutoModelForObjectDetection.from_pretrained(trained, attn_implementation="eager")
    expected = measure(theirs, dict(inputs), "sparsemax", "decoder_cross")
    assert table["zeros"]["decoder_cross"] == pytest.approx(
        expected["zeros"], abs=0.02
    )  # libraries scale alike to a rounding
    sharpened = sparsity_table([str(trained)], ["sparsemax"], pictures=[picture], sharpen=50.0).set_index("site")
    assert (sharpened["zeros"] > table["zeros"]).all()


def test_pictures_for_random_weights(tiny_models, picture):
    both = [sparsity_table(["detr"], ["sparsemax"], pictures=p, size=128) for p in ((), [picture])]
    assert both[0]["keys"].tolist() == [4 * 4, 11, 4 * 4]
    assert both[1]["keys"].tolist() == [4 * 6, 11, 4 * 6]  # 128 x 192 pixels
    assert not both[0]["zeros"].equals(both[1]["zeros"])


def test_random_weights_of_every_type_need_nothing_but_transformers():
    for name in KINDS:
        with torch.device("meta"):
            model = open_detector(name).model
        assert set(huggingface.sites_of(model)) == {"encoder_self", "decoder_self", "decoder_cross"}


def test_random_weights_are_drawn_apart_from_the_caller(tiny_models):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again = (open_detector("detr").model.state_dict().values() for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert torch.equal(torch.rand(1), expected)


def test_the_table_of_a_page(tiny_models):
    wide = wide_table(sparsity_table(["rt_detr"], ["softmax", "tvmax"], size=128))
    assert list(wide.columns) == ["site", "keys", "measure", "softmax", "tvmax"]
    assert wide.index.name == "model"
    assert len(wide) == 3 * 2
    assert list(wide["measure"]) == ["zeros"] * 3 + ["gini"] * 3
    assert list(wide["site"][:3]) == ["encoder_self", "decoder_self", "decoder_cross"]
    assert wide["tvmax"].isna().sum() == 4


@pytest.mark.parametrize(
    ("models", "options", "error", "name"),
    [
        (["detr"], {"transforms": ["soft"]}, ConfigError, "soft"),
        (["detr"], {"alpha": 3.0}, ConfigError, "alpha 3.0"),
        (["detr"], {"sharpen": 0.0}, ConfigError, "sharpen 0.0"),
        (["nosuch"], {}, WeightsError, "nosuch"),
        (["nobody/nosuch"], {}, WeightsError, "nobody/nosuch"),
        (["detr"], {"pictures": ["nosuch.jpg"]}, DataError, "nosuch.jpg"),
    ],
)
def test_faults_name_what_is_wrong(models, options, error, name):
    with pytest.raises(error, match=name) as caught:
        sparsity_table(models, **options)
    assert "\n" not in str(caught.value)


def test_folders_that_hold_no_detector_are_named(trained):
    weights = trained / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(WeightsError, match=trained.name):
        open_detector(str(trained))
    (trained / "config.json").unlink()
    with pytest.raises(WeightsError, match=trained.name):
        open_detector(str(trained))
