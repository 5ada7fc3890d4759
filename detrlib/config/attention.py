"""Settings of attention: which transform stands at which site, and what each of them needs."""

from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field

from detrlib.config.section import Section

TransformName = Literal[
    "softmax",
    "sparsemax",
    "entmax15",
    "entmax",
    "alpha_entmax",
    "tvmax",
    "normmax",
    "budget",
    "sparsegen",
    "ssmax",
    "asentmax",
    "softpick",
    "topk",
    "sigmoid",
    "relu",
]
# tvmax needs keys that form a grid, and those of decoder_self are queries.
QueryTransformName = Literal[tuple(name for name in get_args(TransformName) if name != "tvmax")]
NullKey = Literal["none", "zero", "learned"]
SiteName = Literal["encoder_self", "decoder_self", "decoder_cross"]
# Settings of some transforms only, which change nothing at a site that has another one.
OF_TRANSFORMS = {
    "alpha": {"entmax", "asentmax"},
    "alpha_init": {"alpha_entmax"},
    "tv_lambda": {"tvmax"},
    "normmax_alpha": {"normmax"},
    "budget": {"budget"},
    "sparsegen_lambda": {"sparsegen"},
    "ssmax_init": {"ssmax"},
    "topk": {"topk"},
}
# Transforms whose weights a null key leaves as they are: its own is zero, or keys do not compete.
WITHOUT_NULL_KEY = {"zero": ("softpick", "sigmoid", "relu"), "learned": ("sigmoid", "relu")}


def _start_of_alpha(value: float | str) -> float | str:
    if not isinstance(value, str) and not 1.01 < value < 2.0:
        raise ValueError("must lie between 1.01 and 2, or be 'normal' or 'cloned'")
    return value


class Anneal(Section):
    """From dense to sparse: alphas that start near softmax and move, step by step, to those of their transforms."""

    epochs: float = Field(0.0, ge=0.0)  # until they have arrived, 0.8 for example; 0: they are there from the start
    start: float = Field(1.01, ge=1.0, lt=2.0)  # 1 is softmax itself; kernels on a GPU begin at 1.01
    sites: tuple[SiteName, ...] | None = None  # None: all of sparsemax, entmax15 or entmax


class QueryAttention(Section):
    """Transforms where only queries attend to each other by scores, and what any of them needs."""

    decoder_self: QueryTransformName = "softmax"
    alpha: float = Field(1.5, ge=1.000001, le=2.0)  # of "entmax" and "asentmax", fixed
    # of "alpha_entmax"; "normal": pre_alpha from N(0, 1); "cloned": so too, but one draw for all layers of a site
    alpha_init: Annotated[float | Literal["normal", "cloned"], AfterValidator(_start_of_alpha)] = 1.5
    # published: 2 and 5; the larger, the nearer to equal are the weights. Outside, float32 cannot tell them any more
    normmax_alpha: float = Field(2.0, ge=1.001, le=1000.0)
    budget: float = Field(2.0, gt=0.0)  # what weights of "budget" sum to, none of them above one
    sparsegen_lambda: float = Field(0.5, lt=1.0)  # 0: sparsemax; towards 1: sparser; below 0: denser
    ssmax_init: float = 0.168  # where a of softmax(a log(n) s) starts: there a log(n) is 1 on average over n to 1024
    topk: int = Field(64, ge=1)  # keys that have weight
    anneal: Anneal = Anneal()
    # A key that stands for none, beside those that are scored: a head with nothing to say rests there. Its score is
    # zero, or learned, one per head of a layer, from zero on
    null_key: NullKey = "none"
    null_key_sites: tuple[SiteName, ...] | None = None  # None: all that score keys


class Attention(QueryAttention):
    """Transforms at all three sites, where keys may also be cells of the image."""

    encoder_self: TransformName = "softmax"
    decoder_cross: TransformName = "softmax"
    # of "tvmax": price of a step between neighbouring cells. In place of it tv_alpha may be given, the parameter of the
    # published code, which is twice as large: the thesis's 0.1 is a tv_lambda of 0.05
    tv_lambda: float = Field(0.1, ge=0.0)


class HeadOptions(Section):
    """What heads of this library's own layers can do beside weighing keys, see attention/gates.py."""

    # Lets through a share of what a head, or each of its channels, has mixed, as the query says
    gate: Literal["none", "head", "channel"] = "none"
    gate_sites: tuple[SiteName, ...] | None = None  # None: all that score keys
    differential: bool = False  # a head looks by one map less a share of another: weights may be negative
    differential_sites: tuple[SiteName, ...] | None = None  # likewise


class OwnQueryAttention(QueryAttention, HeadOptions):
    """Of models that score keys at decoder_self alone."""


class OwnAttention(Attention, HeadOptions):
    """Of models that score keys at all sites."""
