"""The architectures: settings of their own, what contradicts what, and what follows from what."""

import pytest

from detrlib.config import Deformable, Detr, load_config, save_config
from detrlib.errors import ConfigError

DEFORMABLE = {"model.architecture": "deformable"}
TWO_STAGE = DEFORMABLE | {"model.deformable.refine": True, "model.deformable.two_stage": True}


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigError, match=r"hidden_dim 252 is not a multiple of model\.num_heads 8"):
        load_config(overrides={"model.hidden_dim": 252})
    with pytest.raises(ConfigError, match=r"model\.hidden_dim: .*multiple of 4"):
        load_config(overrides={"model.hidden_dim": 250})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model.deformable.refine": True}, "model.architecture detr"),
        (DEFORMABLE | {"model.classification": "softmax"}, "model.classification.*sigmoid"),
        (DEFORMABLE | {"model.queries": "anchor"}, "model.queries.*learned"),
        (DEFORMABLE | {"model.norm": "pre"}, "model.norm.*post"),
        (DEFORMABLE | {"model.attention.encoder_self": "entmax15"}, "model.attention.encoder_self.*decoder_self"),
        (DEFORMABLE | {"model.attention.decoder_cross": "tvmax"}, "model.attention.decoder_cross.*decoder_self"),
        (DEFORMABLE | {"model.attention.padding": "add_one"}, "model.compatibility.padding.*'thesis'"),
        (DEFORMABLE | {"model.attention.decoder_self": "tvmax"}, "model.attention.decoder_self"),
        (DEFORMABLE | {"model.deformable.two_stage": True}, "two_stage needs.*model.deformable.refine.*set it to true"),
        (DEFORMABLE | {"model.deformable.query_init": "memory"}, "query_init: memory.*two_stage"),
        (DEFORMABLE | {"model.deformable.class_specific_proposals": True}, "class_specific_proposals.*two_stage"),
        (DEFORMABLE | {"model.deformable.rho": 0.3}, "rho below 1.*two_stage"),
        (DEFORMABLE | {"model.deformable.encoder_auxiliary": True}, "encoder_auxiliary.*two_stage"),
        (TWO_STAGE | {"model.deformable.rho": 0.0}, "rho"),
        (TWO_STAGE | {"model.deformable.rho": 0.3, "model.encoder_layers": 0}, "model.encoder_layers of 1 or more"),
        (TWO_STAGE | {"loss.auxiliary": False}, "loss.auxiliary.*set it to true"),
        (DEFORMABLE | {"model.deformable.stages": [2, 3]}, "end with 4"),
        (DEFORMABLE | {"model.deformable.stages": [4, 3]}, "ascend"),
        (DEFORMABLE | {"model.deformable.levels": 1, "model.deformable.stages": [3, 4]}, "levels to 2"),
        (DEFORMABLE | {"model.registers": 2}, "model.registers 2.*leave model.registers out"),
        (
            DEFORMABLE | {"model.attention.gate": "head", "model.attention.gate_sites": "decoder_cross"},
            "model.attention.gate_sites.*decoder_cross",
        ),
    ],
)
def test_deformable_settings_that_make_no_sense_are_refused_with_reason_and_remedy(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(overrides=overrides)


def test_the_two_families_have_settings_of_their_own():
    detr, deformable = load_config().model, load_config(overrides=DEFORMABLE).model
    assert (type(detr), type(deformable)) == (Detr, Deformable)
    assert not hasattr(deformable, "norm") and not hasattr(detr, "deformable")
    assert [deformable.transform_at(site) for site in ("encoder_self", "decoder_self")] == ["deformable", "softmax"]
    with pytest.raises(ConfigError, match=r"model\.architecture.*did you mean 'deformable'"):
        load_config(overrides={"model.architecture": "deformabel"})


def test_what_is_always_so_in_a_family_may_be_said():
    """As older files do, and the settings saved in older runs, which name those of both families."""
    said = {"model.classification": "sigmoid", "model.queries": "learned", "model.norm": "post", "model.polling": None}
    older = {"model.attention.encoder_self": "softmax", "model.attention.tv_lambda": 0.1, "model.polling.pooled": 30}
    assert load_config(overrides=DEFORMABLE | said | older) == load_config(overrides=DEFORMABLE)
    assert load_config(overrides={"model.deformable.levels": 4}) == load_config()


@pytest.mark.parametrize(("levels", "stages"), [(1, (4,)), (2, (3, 4)), (3, (2, 3, 4)), (4, (2, 3, 4))])
def test_stages_of_the_backbone_follow_from_the_levels(levels, stages):
    deformable = load_config(overrides=DEFORMABLE | {"model.deformable.levels": levels}).model.deformable
    assert deformable.backbone_stages() == stages


def test_any_transform_but_tvmax_can_stand_between_the_queries_of_a_deformable_decoder():
    model = load_config(overrides=DEFORMABLE | {"model.attention.decoder_self": "sparsemax"}).model
    assert model.attention.decoder_self == "sparsemax"


def test_stages_are_saved_and_loaded(tmp_path):
    cfg = load_config(overrides=DEFORMABLE | {"model.deformable.stages": "[1, 4]"})
    save_config(cfg, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == cfg
    assert cfg.model.deformable.stages == (1, 4)


ANNEAL = "model.attention.anneal"


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({f"{ANNEAL}.epochs": 1}, rf"{ANNEAL}.*encoder_self softmax.*{ANNEAL}\.sites"),
        ({f"{ANNEAL}.epochs": 1, "model.attention.decoder_cross": "alpha_entmax"}, "decoder_cross alpha_entmax"),
        ({f"{ANNEAL}.epochs": 1, f"{ANNEAL}.sites": [], "model.attention.decoder_cross": "sparsemax"}, "no site"),
        ({f"{ANNEAL}.start": 1.2, "model.attention.decoder_cross": "sparsemax"}, rf"{ANNEAL}\.epochs"),
        (
            {f"{ANNEAL}.epochs": 1, f"{ANNEAL}.sites": ["decoder_self"], "model.attention.decoder_cross": "entmax15"},
            "decoder_self softmax",
        ),
        (DEFORMABLE | {f"{ANNEAL}.epochs": 1, f"{ANNEAL}.sites": ["decoder_cross"]}, "decoder_cross deformable"),
        ({f"{ANNEAL}.start": 0.99}, rf"{ANNEAL}\.start"),
        (
            {f"{ANNEAL}.epochs": 1, f"{ANNEAL}.start": 1.6, "model.attention.decoder_cross": "entmax15"},
            rf"{ANNEAL}\.start 1\.6 .*decoder_cross",
        ),
    ],
)
def test_annealing_of_what_has_no_fixed_alpha_is_refused(overrides, named):
    with pytest.raises(ConfigError, match=named):
        load_config(overrides=overrides)


def test_alphas_move_on_a_line_from_the_start_to_the_transform_s_own():
    attention = {"encoder_self": "sparsemax", "decoder_self": "entmax15", "decoder_cross": "entmax", "alpha": 1.3}
    cfg = load_config(overrides={"model.attention": attention | {"anneal": {"epochs": 2, "start": 1.1}}})
    halfway = {"encoder_self": 1.55, "decoder_self": 1.3, "decoder_cross": 1.2}
    assert cfg.model.annealed_alphas(0) == dict.fromkeys(halfway, 1.1)
    assert cfg.model.annealed_alphas(1) == pytest.approx(halfway)
    aims = {"encoder_self": 2.0, "decoder_self": 1.5, "decoder_cross": 1.3}
    assert cfg.model.annealed_alphas(2) == cfg.model.annealed_alphas(7.5) == aims  # exactly
    chosen = load_config(
        overrides={"model.attention": attention | {"anneal": {"epochs": 2, "sites": ["encoder_self"]}}}
    )
    assert chosen.model.annealed_alphas(2) == {"encoder_self": 2.0}
    assert load_config(overrides={"model.attention": attention}).model.annealed_alphas(0) == {}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model.attention.gate_sites": "decoder_cross"}, r"gate_sites.*model\.attention\.gate"),
        ({"model.attention.differential_sites": "decoder_self"}, r"differential_sites.*model\.attention\.differential"),
        ({"model.registers": 2, "model.encoder_layers": 0}, r"model\.registers.*model\.encoder_layers"),
        ({"model.registers": -1}, r"model\.registers"),
        ({"model.attention.gate": "heads"}, r"model\.attention\.gate.*did you mean 'head'"),
        ({"model.attention.differential": True, "model.hidden_dim": 24}, r"model\.attention\.differential.*odd"),
        (
            {"model.attention.gate": "head", "model.attention.gate_sites": "encoder_self", "model.encoder_layers": 0},
            r"gate_sites.*encoder_self",
        ),
        ({"model.architecture": "huggingface", "model.type": "detr", "model.attention.gate": "head"}, "attention.gate"),
        ({"model.architecture": "huggingface", "model.type": "detr", "model.registers": 1}, "model.registers"),
    ],
)
def test_options_of_heads_and_registers_that_make_no_sense_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(overrides=overrides)
