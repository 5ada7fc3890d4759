"""Groups of parameters with rates of their own, and the schedules that the rates follow."""

import copy
import itertools

import pytest
import torch

from detrlib.engine.evaluate import load_model
from detrlib.engine.loop import train
from detrlib.engine.optimizer import build_optimizer, lr_factor, parameter_groups
from detrlib.models import alpha_modules, build_model


@pytest.fixture(scope="session")
def settings(tiny_config):
    def settings(**values):
        return tiny_config({f"train.{name}": value for name, value in values.items()}).train

    return settings


@pytest.fixture(scope="session")
def model_of(tiny_config):
    def model_of(overrides):
        return build_model(tiny_config({"model.num_classes": 7} | overrides).model)

    return model_of


def test_alpha_has_a_group_of_its_own_found_by_the_type_of_its_module(model_of, settings):
    model = model_of({"model.attention.decoder_cross": "alpha_entmax", "model.attention.encoder_self": "alpha_entmax"})
    groups = {group["name"]: group for group in parameter_groups(model, settings(lr=2e-3, lr_backbone=3e-4))}
    alphas = {id(module.pre_alpha) for module in alpha_modules(model).values()}
    assert len(alphas) == 3
    assert {id(p) for p in groups["alpha"]["params"]} == alphas
    assert groups["alpha"]["weight_decay"] == 0.0
    assert groups["alpha"]["lr"] == pytest.approx(2e-2)
    assert groups["rest"]["lr"] == 2e-3 and groups["backbone"]["lr"] == 3e-4
    assert "weight_decay" not in groups["rest"] and "weight_decay" not in groups["backbone"]
    trained = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(trained) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert {id(p) for p in groups["backbone"]["params"]} == {id(p) for p in model.backbone.parameters()}


def test_what_else_transforms_learn_has_a_group_without_decay(model_of, settings):
    attention = {"decoder_cross": "alpha_entmax", "encoder_self": "ssmax", "null_key": "learned"}
    model = model_of({f"model.attention.{name}": value for name, value in attention.items()})
    groups = {group["name"]: group for group in parameter_groups(model, settings(lr=2e-3))}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(parameter)].rpartition(".")[2] for parameter in groups["transforms"]["params"]}
    assert found == {"a", "null_score"}
    assert groups["transforms"]["weight_decay"] == 0.0 and groups["transforms"]["lr"] == pytest.approx(2e-2)
    assert all(names[id(p)].endswith("pre_alpha") for p in groups["alpha"]["params"])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_an_update_does_not_depend_on_the_layout_of_a_checkpoint(settings, layout):
    """Filters lie otherwise on another kind of processor, and the fused update takes numbers as they lie in memory."""
    torch.manual_seed(0)
    updated, gradients = [], torch.randn(2, 8, 4, 3, 3)
    for move in (False, True):
        torch.manual_seed(1)
        filters = torch.nn.Conv2d(4, 8, 3, bias=False)
        optimizer = build_optimizer(filters, settings())
        for gradient in gradients:
            filters.weight.grad = gradient.clone()
            optimizer.step()
            state = optimizer.state_dict()
            for name in ("exp_avg", "exp_avg_sq") if move else ():
                state["state"][0][name] = state["state"][0][name].contiguous(memory_format=layout)
            optimizer.load_state_dict(state)
        updated.append(filters.weight.detach())
    torch.testing.assert_close(*updated, rtol=0, atol=0)


def test_a_run_of_an_earlier_version_goes_on_in_one_pass(settings):
    torch.manual_seed(0)
    linear, gradients = torch.nn.Linear(4, 3), torch.randn(2, 3, 4)
    before = torch.optim.AdamW([{"params": [linear.weight], "name": "rest"}], lr=0.1, weight_decay=0.2)
    linear.weight.grad = gradients[0]
    before.step()
    linear.bias = None
    copied = copy.deepcopy(linear)
    after = build_optimizer(copied, settings())
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    assert after.param_groups[0]["fused"] and after.param_groups[0]["lr"] == 0.1
    linear.weight.grad, copied.weight.grad = gradients[1], gradients[1].clone()
    before.step()
    after.step()
    torch.testing.assert_close(copied.weight, linear.weight)


def test_the_rate_of_alpha_can_be_set_to_anything_even_zero(model_of, settings):
    model = model_of({"model.attention.decoder_cross": "alpha_entmax"})
    rates = [parameter_groups(model, settings(lr_alpha=rate))[-1]["lr"] for rate in (0.5, 0.0)]
    assert rates == [0.5, 0.0]


def test_what_places_samples_has_a_group_of_its_own_at_a_tenth_of_the_rate(model_of, settings):
    overrides = {"model.architecture": "deformable", "model.classification": "sigmoid", "model.deformable.levels": 1}
    model = model_of(overrides | {"model.attention.decoder_self": "alpha_entmax"})
    groups = {group["name"]: group for group in parameter_groups(model, settings(lr=2e-3))}
    assert list(groups) == ["rest", "backbone", "projections", "alpha"]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(parameter)] for parameter in groups["projections"]["params"]}
    assert found == {n for n in names.values() if "sampling_offsets" in n or "transformer.reference_points" in n}
    assert len(found) == 2 * (1 + 2) + 2
    assert groups["projections"]["lr"] == pytest.approx(2e-4) and "weight_decay" not in groups["projections"]
    trained = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(trained) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    rates = [{g["name"]: g["lr"] for g in parameter_groups(model, settings(lr_projections=r))} for r in (0.5, 0.0)]
    assert [rate["projections"] for rate in rates] == [0.5, 0.0]


def test_no_group_is_empty_and_a_rate_of_zero_freezes_the_backbone(model_of, settings):
    model = model_of({})
    assert [group["name"] for group in parameter_groups(model, settings())] == ["rest", "backbone"]
    groups = parameter_groups(model, settings(lr_backbone=0))
    assert [group["name"] for group in groups] == ["rest"]
    assert not any(p.requires_grad for p in model.backbone.parameters())
    assert all(p.requires_grad for name, p in model.named_parameters() if not name.startswith("backbone."))


def part_of(name):
    """Which part of a model a parameter belongs to."""
    if name.startswith("backbone."):
        return "backbone"
    for part in ("encoder", "decoder"):
        if name.startswith(f"transformer.{part}."):
            return "alpha" if name.endswith("pre_alpha") else part
    return "heads" if name.startswith(("class_embed.", "bbox_embed.")) else "rest"


@pytest.mark.parametrize(
    ("frozen", "moving"),
    [
        (["backbone"], {"alpha", "encoder", "decoder", "heads", "rest"}),
        (["encoder", "backbone"], {"alpha", "decoder", "heads", "rest"}),
        (["decoder"], {"backbone", "encoder", "heads", "rest"}),  # its alphas are a part of it
        (["all_but_alpha_and_heads"], {"alpha", "heads"}),
    ],
    ids=lambda value: "-".join(sorted(value)),
)
def test_what_is_frozen_does_not_change_by_a_bit_and_everything_else_does(frozen, moving, tmp_path, tiny_config):
    learned = {"model.attention.decoder_cross": "alpha_entmax", "train.freeze": frozen, "train.epochs": 1}
    train(tiny_config(learned | {"train.ema": 0.5, "train.weight_decay": 0.1}), tmp_path)
    before, after = (dict(load_model(tmp_path, which).named_parameters()) for which in ("untrained", "last"))
    moved = {name: not torch.equal(before[name], value) for name, value in after.items()}
    assert moved == {name: part_of(name) in moving for name in after}


def test_step_schedule_drops_once_after_lr_drop_epochs(settings):
    cfg = settings(schedule="step", lr_drop=3)
    assert [lr_factor(step, 10, cfg) for step in (0, 29, 30, 500)] == [1.0, 1.0, 0.1, 0.1]


def test_cosine_schedule_falls_from_one_to_zero_over_all_epochs(settings):
    cfg = settings(schedule="cosine", epochs=5)
    factors = [lr_factor(step, 10, cfg) for step in range(51)]
    assert factors[0] == 1.0 and factors[25] == pytest.approx(0.5) and factors[50] == pytest.approx(0.0)
    assert all(later < earlier for earlier, later in itertools.pairwise(factors))
    assert lr_factor(60, 10, cfg) == pytest.approx(0.0)


def test_constant_schedule_and_warm_up(settings):
    assert {lr_factor(step, 10, settings(schedule="constant")) for step in range(100)} == {1.0}
    cfg = settings(schedule="cosine", epochs=2, warmup_steps=4)
    factors = [lr_factor(step, 10, cfg) for step in range(20)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[12] == pytest.approx(0.5)  # half of the 16 steps that the warm-up leaves
