"""What a model costs: parameters and multiply-adds, by component (times are in `benchmarks`).

    cost_table({"mine": model}, (800, 1066))          one row per model and component

One multiply-add is one FLOP, as in the tables of DETR and its successors: convolutions, linear layers, the two products
of attention and the interpolation inside deformable attention are counted, other transforms than softmax as if they
were softmax. Normalisation, activations and sums are not. Nothing is computed: sizes alone run through the model.
"""

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from detrlib.attention.transforms import Softmax, Transform

PUBLISHED_SIZE = (850, 1040)
ATEN = torch.ops.aten
REST = "rest"  # what is in no component: queries, level embeddings

# Where a module belongs, by the beginning of its path, first match first: heads also work inside the decoder.
COMPONENTS = {
    **dict.fromkeys(("class_embed", "bbox_embed", "class_labels_classifier", "bbox_predictor"), "heads"),
    **dict.fromkeys(("decoder.class_embed", "decoder.bbox_embed"), "heads"),
    **dict.fromkeys(("encoder_input_proj", "decoder_input_proj", "input_projection"), "input projection"),
    **dict.fromkeys(("enc_output", "enc_score_head", "enc_bbox_head"), "proposals"),
    "encoder": "encoder",
    "decoder": "decoder",
    "transformer.enc_output": "proposals",
    "transformer.pos_trans": "proposals",
    "transformer.enc_mask_predictor": "scoring",
    "transformer.decoder": "decoder",
    "transformer.encoder": "encoder",
    "input_proj": "input projection",
    "backbone": "backbone",
}
ORDER = ("backbone", "input projection", "scoring", "encoder", "proposals", "decoder", "heads", REST)


def component_of(path: str) -> str:
    """The component of the module or parameter at a dotted path, in a detector of transformers too."""
    path = re.sub(r"^(model\.)+", "", path)
    holding = (name for prefix, name in COMPONENTS.items() if f"{path}.".startswith((f"{prefix}.", f"{prefix}_")))
    return next(holding, REST)


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Trainable and frozen parameters of every component; shared ones count once."""
    counts = {name: [0, 0] for name in ORDER}
    for path, parameter in model.named_parameters():
        counts[component_of(path)][not parameter.requires_grad] += parameter.numel()
    return {name: tuple(count) for name, count in counts.items()}


def count_flops(
    model: nn.Module, size: tuple[int, int] = PUBLISHED_SIZE, elementwise: Mapping[Any, int] | None = None
) -> dict[str, int]:
    """Multiply-adds of every component for one image of `size` (height, width) without padding.

    elementwise: operations to count for every element of a result, besides multiply-adds, by operator of torch.ops.aten
    (see benchmarks/published.py). Tokens that a sparse encoder leaves out are not counted.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    with fake:  # tensors have sizes, but no content
        twin.to_empty(device="cpu")
        images = torch.empty(1, 3, *size)
    for module in twin.modules():
        if isinstance(getattr(module, "transform", None), Transform):
            module.transform = Softmax()  # needs no content
    counts: Counter[str] = Counter()
    counter = FlopCounterMode(display=False)
    formulas = counter.flop_registry | dict.fromkeys(INTERPOLATION, _interpolation)
    formulas |= {operator: _per_element(factor) for operator, factor in (elementwise or {}).items()}
    for operator, formula in formulas.items():
        counter.flop_registry[operator] = _noted(formula, counter, counts)
    # Attention as two products, whichever kernels there are.
    with sdpa_kernel(SDPBackend.MATH), counter:
        twin(images)
    return {name: counts[name] for name in ORDER}


# Deformable attention adds up weighted rows of values.
INTERPOLATION = (ATEN._embedding_bag, ATEN._embedding_bag_forward_only)


def _interpolation(table, indices, *args, **kwargs) -> int:
    return 2 * indices.numel() * table.shape[1]


def _per_element(factor: int) -> Callable[..., int]:
    return lambda *args, out_val, **kwargs: 2 * factor * (out_val if torch.is_tensor(out_val) else out_val[0]).numel()


def _noted(formula: Callable[..., int], counter: FlopCounterMode, counts: Counter[str]) -> Callable[..., int]:
    """`formula`, whose results are also added up by component; torch counts both operations of a multiply-add."""

    def count(*args, **kwargs) -> int:
        flops = formula(*args, **kwargs)
        counts[_component(counter.mod_tracker.parents)] += flops // 2
        return flops

    return count


def _component(parents: Iterable[str]) -> str:
    """Of all modules at work, the one whose component comes first."""
    components = {component_of(path.partition(".")[2]) for path in parents}
    return next((name for name in dict.fromkeys(COMPONENTS.values()) if name in components), REST)


def cost_table(models: Mapping[str, nn.Module], size: tuple[int, int] = PUBLISHED_SIZE) -> pd.DataFrame:
    """Costs of models for an image of `size`, tidy: columns model, component, parameters, frozen, gflops.

    One row for each component that a model has, and one called "total".
    """
    tables = []
    for label, model in models.items():
        table = pd.DataFrame(count_parameters(model), index=["parameters", "frozen"]).T
        table["gflops"] = pd.Series(count_flops(model, size)) / 1e9
        table = table[table.any(axis=1)]
        table.loc["total"] = table.sum()
        table = table.astype({"parameters": int, "frozen": int}).rename_axis("component").reset_index()
        tables.append(table.assign(model=label))
    return pd.concat(tables, ignore_index=True)[["model", "component", "parameters", "frozen", "gflops"]]
