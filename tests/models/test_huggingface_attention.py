"""Our transforms in detectors of transformers: theirs for softmax, nothing on padding, in and out without a trace."""

import copy
import io
import sys

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from detrlib.attention import TRANSFORMS, AlphaEntmax
from detrlib.attention.reference import entmax as reference_entmax
from detrlib.attention.transforms import Softmax, Sparsemax, Transform
from detrlib.errors import ConfigError, ModelError
from detrlib.models import alpha_modules
from detrlib.models.huggingface_attention import SITES, sites_of, use

transformers = pytest.importorskip("transformers")

GLOBAL = ("detr", "conditional_detr", "dab-detr", "table-transformer")  # every key is a cell or a query
HYBRID = ("rt_detr", "rt_detr_v2", "d_fine", "deimv2")  # an encoder of one level, deformable cross-attention
FAMILIES = (*GLOBAL, "deformable_detr", *HYBRID)
RETURNED = {
    "encoder_self": "encoder_attentions",
    "decoder_self": "decoder_attentions",
    "decoder_cross": "cross_attentions",
}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def inputs(family, batch=2):
    """Noise, and a second image that is half padding where the model takes a mask."""
    generator = torch.Generator().manual_seed(1)
    given = {"pixel_values": torch.randn(batch, 3, 128, 160, generator=generator)}
    if family not in HYBRID:
        given["pixel_mask"] = torch.ones(batch, 128, 160, dtype=torch.long)
        given["pixel_mask"][1:, :, 64:] = 0
    return given


@torch.no_grad()
def run(model, family):
    return model(**inputs(family), output_attentions=True)


def weights_at(outputs, site):
    """Weights of the layers of a site, heads before queries and sampling points of all levels in one row."""
    maps = getattr(outputs, RETURNED[site])
    return [each.flatten(3).transpose(1, 2) if each.shape[1] != 4 else each for each in maps]


def same(outputs, others):
    return all(torch.equal(getattr(outputs, name), getattr(others, name)) for name in ("logits", "pred_boxes"))


def assert_close(outputs, others):
    for name in ("logits", "pred_boxes"):
        torch.testing.assert_close(getattr(outputs, name), getattr(others, name), rtol=0, atol=1e-5)


def test_every_site_is_found_in_layer_order(huggingface_detector, family):
    model = huggingface_detector(family)
    found = sites_of(model)
    assert {site: len(modules) for site, modules in found.items()} == {
        "encoder_self": 1 if family in HYBRID else 2,
        "decoder_self": 2,
        "decoder_cross": 2,
    }
    paths = {id(module): path for path, module in model.named_modules()}
    for modules in found.values():
        assert [paths[id(module)] for module in modules] == sorted(paths[id(module)] for module in modules)
        assert not any("backbone" in paths[id(module)] for module in modules)


@pytest.mark.parametrize("implementation", ["eager", None])  # None: what they choose, sdpa where there is such
def test_softmax_is_theirs_and_leaves_no_trace(huggingface_detector, family, implementation):
    expected = run(huggingface_detector(family, "eager"), family)
    model = huggingface_detector(family, implementation)
    before = run(model, family)
    classes, names = [type(module) for module in model.modules()], list(model.state_dict())
    with use("softmax", model) as inside:
        outputs = run(inside, family)
    assert_close(outputs, expected)
    for site in SITES:
        for ours, theirs in zip(weights_at(outputs, site), weights_at(expected, site), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert [type(module) for module in model.modules()] == classes
    assert list(model.state_dict()) == names
    assert not any("transform" in vars(module) for module in model.modules())
    assert same(run(model, family), before)


def test_weights_are_those_of_the_transform(huggingface_detector, family):
    """Two algorithms: scores are those whose softmax the model returns; the reference makes other weights of them."""
    model = huggingface_detector(family)

    def first_layer(name):
        with use(name, model, "encoder_self", alpha=1.3, alpha_init=1.7):
            return weights_at(run(model, family), "encoder_self")[0].double()

    scores = first_layer("softmax").log()
    rows = scores.isfinite().all(-1)  # padding apart, whose logarithm is not finite
    assert rows.any()
    for name, alpha in {"softmax": 1, "sparsemax": 2.0, "entmax15": 1.5, "entmax": 1.3, "alpha_entmax": 1.7}.items():
        expected = reference_entmax(scores[rows], alpha)
        torch.testing.assert_close(first_layer(name)[rows], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", None])
@pytest.mark.parametrize("family", GLOBAL)
def test_padding_gets_exactly_nothing(huggingface_detector, family, implementation):
    model = huggingface_detector(family, implementation)
    cells = torch.zeros(4, 5, dtype=torch.bool)
    cells[:, 2:] = True  # 64 of 160 pixels are the image
    for name in TRANSFORMS:
        with use(name, model, ["encoder_self", "decoder_cross"]):
            outputs = run(model, family)
        for site in ("encoder_self", "decoder_cross"):
            for weights in weights_at(outputs, site):
                assert weights.shape[-1] == 20
                assert not weights[1][..., cells.flatten()].any(), name
                if name not in ("budget", "softpick", "sigmoid", "relu"):  # whose rows sum to something else
                    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["softmax", "sparsemax", "tvmax"])
def test_null_keys_take_weight_at_every_way_of_changing_attention(huggingface_detector, name):
    for family in ("detr", "dab-detr"):
        model = huggingface_detector(family)
        sites = ("encoder_self", "decoder_cross")
        with use(name, model, sites, null_key="learned"):
            outputs = run(model, family)
            learned = [name for name, _ in model.named_parameters() if name.endswith("transform.null_score")]
        assert len(learned) == 4
        for site in sites:
            sums = torch.cat([weights.sum(-1).flatten() for weights in weights_at(outputs, site)])
            assert (sums <= 1 + 1e-5).all() and (sums < 0.999).any()
        assert not any("null_score" in name for name in model.state_dict())


def test_without_the_mask_of_padding_weights_lie_on_it(huggingface_detector):
    model = huggingface_detector("detr")
    with use("sparsemax", model), torch.no_grad():
        outputs = model(inputs("detr")["pixel_values"], output_attentions=True)
    assert outputs.encoder_attentions[0][1].unflatten(-1, (4, 5))[..., 2:].any()


def test_images_that_are_all_padding_are_zero_and_finite(huggingface_detector, family):
    if family in HYBRID or family == "deformable_detr":
        pytest.skip("attention without padding, or whose padding is not in its scores")
    model, given = huggingface_detector(family), inputs(family)
    given["pixel_mask"][1] = 0
    with use("alpha_entmax", model):
        outputs = model(**given, output_attentions=True)
        outputs.logits.square().sum().backward()
    assert not weights_at(outputs, "decoder_cross")[0][1].any()
    assert outputs.logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_sparse_transforms_have_exact_zeros_where_they_are_put(huggingface_detector, family):
    model = huggingface_detector(family)
    with torch.no_grad():
        for modules in sites_of(model).values():  # sharper scores
            for module in modules:
                for name, layer in module.named_children():
                    if name in ("q_proj", "attention_weights", "q_content_proj"):
                        layer.weight.mul_(6)
    with use({"decoder_cross": "sparsemax", "decoder_self": "softmax"}, model):
        outputs = run(model, family)
    zeros = {site: (torch.stack(weights_at(outputs, site)) == 0).float()[:, :1].mean() for site in SITES}
    assert zeros["decoder_cross"] > 0.1 > zeros["decoder_self"]
    assert zeros["encoder_self"] < 0.1


def test_sites_may_have_different_transforms(huggingface_detector, family):
    names = {"encoder_self": "sparsemax", "decoder_self": "entmax15", "decoder_cross": "alpha_entmax"}
    model = huggingface_detector(family)
    with use(names, model):
        kinds = {site: {type(m.transform).__name__ for m in modules} for site, modules in sites_of(model).items()}
        assert not same(run(model, family), run(huggingface_detector(family), family))
    assert kinds == {"encoder_self": {"Sparsemax"}, "decoder_self": {"Entmax15"}, "decoder_cross": {"AlphaEntmax"}}


def test_alpha_learns_and_is_found_by_site_and_layer(huggingface_detector, family):
    model = huggingface_detector(family).train()
    handle = use("alpha_entmax", model)
    found = alpha_modules(model)
    layers = {site: len(modules) for site, modules in sites_of(model).items()}
    assert set(found) == {f"{site}.{i}" for site, count in layers.items() for i in range(count)}
    trained = {name for name, _ in model.named_parameters() if name.endswith("transform.pre_alpha")}
    assert len(trained) == len(found)
    outputs = model.eval()(**inputs(family))
    (outputs.logits.square().sum() + outputs.pred_boxes.square().sum()).backward()
    for layer, transform in found.items():
        assert transform.pre_alpha.shape == (4,)
        # Queries are all alike before the first decoder layer of some models: equal scores know no alpha.
        if layer != "decoder_self.0":
            assert transform.pre_alpha.grad.abs().min() > 0, layer
    handle.remove()
    assert not alpha_modules(model)


def test_gradients_of_softmax_are_theirs(huggingface_detector, family):
    def gradients(model):
        model.zero_grad()
        model(**inputs(family)).logits.square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model = huggingface_detector(family)
    expected = gradients(model)
    with use("softmax", model):
        found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["detr", "dab-detr"])
def test_dropout_is_theirs(huggingface_detector, family):
    model = huggingface_detector(family, attention_dropout=0.4).train()

    def train_step():
        torch.manual_seed(3)
        return run(model, family)

    expected = train_step()
    with use("softmax", model):
        assert_close(train_step(), expected)
    assert not same(model.eval()(**inputs(family)), expected)


def test_denoising_queries_are_kept_apart_in_training(huggingface_detector):
    model = huggingface_detector("rt_detr_v2", num_denoising=8, num_labels=3).train()
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.3, 0.4, 0.1, 0.3]])
    labels = [{"class_labels": torch.tensor([1, 2]), "boxes": boxes}] * 2
    with use("sparsemax", model):
        outputs = model(**inputs("rt_detr_v2"), labels=labels, output_attentions=True)
        outputs.loss.backward()
    (weights, *_) = outputs.decoder_attentions
    denoising = weights.shape[-1] - 11
    assert denoising > 0
    assert not weights[:, :, denoising:, :denoising].any()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_models_of_one_config_do_not_meet(huggingface_detector):
    first = huggingface_detector("rt_detr_v2")
    second = type(first)(first.config).eval()
    second.load_state_dict(first.state_dict())
    expected = run(second, "rt_detr_v2")
    with use("sparsemax", first):
        alone = run(first, "rt_detr_v2")
        assert same(run(second, "rt_detr_v2"), expected)
        with use("entmax15", second):
            assert same(run(first, "rt_detr_v2"), alone)
            assert not same(run(second, "rt_detr_v2"), alone)
        assert same(run(second, "rt_detr_v2"), expected)
    assert first.config._attn_implementation == "eager"


def test_uses_nest(huggingface_detector, family):
    model = huggingface_detector(family)
    plain = run(model, family)
    outer = use("sparsemax", model)
    sparse = run(model, family)
    inner = use("entmax15", model, "decoder_cross")
    assert not same(run(model, family), sparse)
    with pytest.raises(ModelError, match="later"):
        outer.remove()
    inner.remove()
    inner.remove()
    assert same(run(model, family), sparse)
    outer.remove()
    assert same(run(model, family), plain)


def test_an_exception_takes_it_out_too(huggingface_detector):
    model = huggingface_detector("detr")
    expected = run(model, "detr")
    with pytest.raises(KeyError), use("sparsemax", model):
        raise KeyError
    assert same(run(model, "detr"), expected)


@pytest.mark.parametrize("family", ["detr", "dab-detr", "d_fine"])
def test_copies_and_pickles_keep_their_transforms(huggingface_detector, family):
    model = huggingface_detector(family)
    with torch.no_grad():
        plain = model(**inputs(family))
        with use("alpha_entmax", model, alpha_init=1.9):
            expected = model(**inputs(family))
            file = io.BytesIO()
            torch.save(model, file)
            copied = copy.deepcopy(model)
            state = model.state_dict()
        file.seek(0)
        read = torch.load(file, weights_only=False)
        for other in (copied, read):
            assert same(other(**inputs(family)), expected)
            with use("softmax", other):
                assert_close(other(**inputs(family)), plain)
        assert same(model(**inputs(family)), plain)
        another = huggingface_detector(family, seed=1)
        use("alpha_entmax", another)
        another.load_state_dict(state)
        assert same(another(**inputs(family)), expected)


@pytest.mark.parametrize("family", [*GLOBAL, *HYBRID])
def test_tvmax_follows_the_grid_of_each_image(huggingface_detector, family):
    sites = ["encoder_self"] if family in HYBRID else ["encoder_self", "decoder_cross"]
    model = huggingface_detector(family)
    plain = run(model, family)
    classes = [type(module) for module in model.modules()]
    with torch.no_grad():
        with use("sparsemax", model, sites):
            expected = run(model, family)
        with use("tvmax", model, sites, tv_lambda=0.0):
            assert_close(run(model, family), expected)
        handles = [use("tvmax", model, site, tv_lambda=100.0) for site in sites]
        for height, width in ((128, 160), (96, 64)):
            outputs = model(torch.randn(1, 3, height, width), output_attentions=True)
            for site in sites:
                for weights in weights_at(outputs, site):  # any step costs more than it is worth
                    torch.testing.assert_close(weights, torch.full_like(weights, 1024 / height / width))
        for handle in handles:
            handle.remove()
    assert same(run(model, family), plain)
    assert [type(module) for module in model.modules()] == classes


def test_a_wrapped_model_learns_in_several_processes(huggingface_detector, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model = huggingface_detector("detr", auxiliary_loss=False)
        use("alpha_entmax", model)
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        wrapped(**inputs("detr")).logits.sum().backward()
        assert all(alpha.pre_alpha.grad is not None for alpha in alpha_modules(wrapped).values())
        for name, settings, learned in (
            ("alpha_entmax", {}, "pre_alpha"),
            ("softmax", {"null_key": "learned"}, "null"),
        ):
            with pytest.raises(ModelError, match=learned):
                use(name, wrapped, **settings)
        with use("sparsemax", wrapped):
            assert all(isinstance(m.transform, Sparsemax) for ms in sites_of(wrapped).values() for m in ms)
    finally:
        torch.distributed.destroy_process_group()


def test_gradient_checkpointing_computes_the_same(huggingface_detector):
    model = huggingface_detector("deformable_detr").train()
    use("alpha_entmax", model)

    def gradients():
        model.zero_grad()
        torch.manual_seed(0)
        model(**inputs("deformable_detr")).logits.square().sum().backward()
        return [transform.pre_alpha.grad.clone() for transform in alpha_modules(model).values()]

    expected = gradients()
    model.activation_checkpointing_enable()
    torch.testing.assert_close(gradients(), expected)


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "name"),
    [
        (("nosuch",), {}, ConfigError, "nosuch"),
        ((["sparsemax"],), {}, ConfigError, "sparsemax"),
        (("softmax", "encoder_cross"), {}, ConfigError, "encoder_cross"),
        (({"encoder": "softmax"},), {}, ConfigError, "'encoder'"),
        (({"encoder_self": "softmax"}, "decoder_self"), {}, ConfigError, "sites"),
        (("entmax",), {"alpha": 2.5}, ConfigError, "alpha 2.5"),
        (("entmax",), {"alpha": float("nan")}, ConfigError, "alpha nan"),
        (("entmax",), {"alpha": "sharp"}, ConfigError, "alpha"),
        (("alpha_entmax",), {"alpha_init": 1.0}, ConfigError, "alpha_init 1.0"),
        (("tvmax", "encoder_self"), {"tv_lambda": -1}, ConfigError, "tv_lambda -1"),
        (("softmax",), {"null_key": "one"}, ConfigError, "null_key 'one'"),
        (("softmax",), {"tau": 1.0}, ConfigError, "'tau'"),
        (("tvmax",), {}, ModelError, "decoder_self"),
    ],
)
def test_faults_change_nothing(huggingface_detector, arguments, settings, error, name):
    model = huggingface_detector("detr")
    classes = [type(module) for module in model.modules()]
    with pytest.raises(error, match=name) as caught:
        use(arguments[0], model, *arguments[1:], **settings)
    assert "\n" not in str(caught.value)
    assert [type(module) for module in model.modules()] == classes


def test_a_site_that_the_model_lacks_is_named_with_those_it_has(huggingface_detector):
    tiny = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    config = transformers.YolosConfig(**tiny, image_size=[32, 32], patch_size=16, num_detection_tokens=5)
    model = transformers.YolosForObjectDetection(config).eval()
    assert list(sites_of(model)) == ["encoder_self"]
    with pytest.raises(ModelError, match=r"decoder_cross; it has encoder_self"):
        use("softmax", model, "decoder_cross")
    with pytest.raises(ModelError, match="encoder_self"):  # patches, but also tokens of detections
        use("tvmax", model)
    with use("sparsemax", model):
        weights = model(torch.randn(1, 3, 32, 32), output_attentions=True).attentions
    assert weights[0].shape[-1] == 10
    for name, settings in (("tvmax", {}), ("softmax", {"null_key": "zero"})):
        with pytest.raises(ModelError, match="decoder_cross"):
            use(name, huggingface_detector("rt_detr"), "decoder_cross", **settings)


def test_models_without_their_attention_are_refused(small):
    for model in (nn.Linear(2, 2), nn.MultiheadAttention(8, 2), small()):
        with pytest.raises(ModelError, match=type(model).__name__):
            use("softmax", model)


def test_attention_without_readable_masks_is_refused(huggingface_detector):
    model = huggingface_detector("detr")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ModelError, match="flex_attention"):
        use("softmax", model)


def test_a_softmax_more_than_expected_is_noticed(huggingface_detector):
    model = huggingface_detector("dab-detr")
    with use("sparsemax", model), pytest.raises(ModelError, match="DabDetrAttention"):
        module = sites_of(model)["decoder_self"][0]
        module.output_proj = nn.Sequential(module.output_proj, nn.Softmax(-1))
        run(model, "dab-detr")


def test_transformers_that_is_missing_or_too_old(monkeypatch, huggingface_detector):
    model = huggingface_detector("detr")
    monkeypatch.setattr("transformers.__version__", "4.57.1")
    with pytest.raises(ConfigError, match=r"4\.57\.1.*detrlib\[huggingface\]"):
        use("softmax", model)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"detrlib\[huggingface\]"):
        use("softmax", model)


def test_own_transforms_can_take_the_place(huggingface_detector):
    """What experiments do: a transform of theirs around the one in use."""

    class Halved(Transform):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, scores, padding=None, grid=None):
            return self.inner(scores, padding, grid) / 2

    model = huggingface_detector("detr")
    with use("softmax", model):
        (first, *_) = sites_of(model)["encoder_self"]
        first.transform, kept = Halved(first.transform), first.transform
        total = run(model, "detr").encoder_attentions[0].sum(-1)
        first.transform = kept
    torch.testing.assert_close(total, torch.full_like(total, 0.5))
    assert isinstance(kept, Softmax) and not isinstance(kept, AlphaEntmax)
