"""What published models cost by our count, beside the numbers of their papers.

    published_costs()

The numbers (published_costs.csv) are those of Carion et al. 2020, Tab. 1 and Roh et al. 2022, Tab. 1, and can be
derived term by term, since the tools behind them are public; the file says which tool saw an image of which size.

- DETR's tool also counts elementwise operations, of which those of a softmax matter, over the first 100 validation
  images of COCO. One image of 850 x 1040 stands in for their mean in Sparse DETR's code; it gives 86 and 187 G within
  1.1 %.
- Sparse DETR's tool is fvcore, which counts 5 for every element of a norm and nothing for a softmax. With 850 x 1040 it
  gives the four dense deformable models to 0.05 %. The code of that paper also runs the box heads of the decoder twice
  when boxes are refined, 0.24 G that we do not spend (`_again`). Heads that serve a loss of the encoder alone are not
  counted.
- The sparse models and DETR with Swin-T were counted on another image. By their slope, 7.55 G for 10 % of the tokens,
  it has 4 % fewer tokens: 800 x 1066, the commonest shape of COCO, gives all eleven to 0.05 %. (On 850 x 1040 they
  would cost 3 to 4 % more.) The tool prints the mean over 100 images but returns the count of the last one.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from detrlib.config import PROJECT, load_config
from detrlib.experiments.costs import ATEN, count_flops, count_parameters
from detrlib.models import build_model
from detrlib.models.deformable import DeformableDETR

PUBLISHED = pd.read_csv(Path(__file__).with_name("published_costs.csv"), index_col="model", keep_default_na=False)
# What the tools behind published tables count for every element of an operation's result.
TOOLS = {
    "detr": {ATEN._softmax: 6, ATEN._safe_softmax: 6},  # 5, and 1 for the dropout after it
    "fvcore": {ATEN.native_layer_norm: 5, ATEN.native_group_norm: 5},
}
OF_COCO = {"model.backbone.weights": "none", "model.backbone.freeze_stem": True, "model.num_classes": 91}


def published_model(name: str) -> nn.Module:
    """A model of `PUBLISHED` with sizes only, no weights (on "meta")."""
    row = PUBLISHED.loc[name]
    setting = dict([row.setting.split("=")]) if row.setting else {}
    with torch.device("meta"):
        path = PROJECT / "papermill_runs" / "configs" / f"{row.config}.yaml"
        return build_model(load_config(path, OF_COCO | setting).model)


def published_costs(names: Sequence[str] = ()) -> pd.DataFrame:
    """Our count beside published numbers, one row per model: of those named, without names of all.

    gflops: what our model spends on an image of `height` x `width`. as_published: the same, counted as the tool behind
    the published number does, with what the published code computes twice; `difference` from `published_gflops` is in
    percent. Parameters are in millions.
    """
    rows = {}
    for name, row in PUBLISHED.loc[list(names) or PUBLISHED.index].iterrows():
        model, size = published_model(name), (row.height, row.width)
        rows[name] = {
            "parameters": sum(count for count, _ in count_parameters(model).values()) / 1e6,
            "published_parameters": row.parameters,
            "height": row.height,
            "width": row.width,
            "gflops": sum(count_flops(model, size).values()) / 1e9,
            "as_published": (sum(count_flops(model, size, TOOLS[row.tool]).values()) + _again(model)) / 1e9,
            "published_gflops": row.gflops,
        }
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")
    return table.assign(difference=100 * (table["as_published"] / table["published_gflops"] - 1))


def _again(model: nn.Module) -> int:
    """Multiply-adds of the decoder's box heads, which the code of Sparse DETR runs a second time when it refines."""
    decoder = model.transformer.decoder if isinstance(model, DeformableDETR) else None
    if decoder is None or not decoder.refine:
        return 0
    weights = [weight for weight in model.bbox_embed[: len(decoder.layers)].parameters() if weight.dim() == 2]
    return model.num_queries * sum(weight.numel() for weight in weights)
