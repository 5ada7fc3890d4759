"""What a training step is measured against: that of detectors of transformers, and of DETR-R50 in plain PyTorch.

All have the same frozen parts, dropout, batch, losses by a Hungarian matching of every decoder layer, clipping and
AdamW. What `plain_step` and `transformers_step` return takes one step when it is called.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

from detrlib.data import Batch
from detrlib.engine.evaluate import autocast
from detrlib.losses.criterion import Criterion
from detrlib.models.outputs import Predictions
from detrlib.models.position import SinePosition
from detrlib.models.transformer import MLP

CLASSES, QUERIES, DIM, HEADS, LAYERS, HIDDEN, DROPOUT, CLIP = 91, 100, 256, 8, 6, 2048, 0.1, 0.1


class PlainLayer(nn.Module):
    """A layer of an encoder, or with `cross_attention` of a decoder, as the official code writes it: sequence first."""

    def __init__(self, cross_attention: bool):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(DIM, HEADS, DROPOUT)
        self.cross_attn = nn.MultiheadAttention(DIM, HEADS, DROPOUT) if cross_attention else None
        self.linear1, self.linear2 = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(DIM) for _ in range(3))
        self.dropout = nn.Dropout(DROPOUT)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        padding: Tensor | None,
        memory: Tensor | None = None,
        key: Tensor | None = None,
    ) -> Tensor:
        """x and position [N,B,E]; padding [B,K] of x, or of memory and key [K,B,E] where there are such."""
        query = x + position
        own = padding if self.cross_attn is None else None
        x = self.norm1(x + self.dropout(self.self_attn(query, query, x, key_padding_mask=own)[0]))
        if self.cross_attn is not None:
            attended, _ = self.cross_attn(x + position, key, memory, key_padding_mask=padding)
            x = self.norm2(x + self.dropout(attended))
        y = self.linear2(self.dropout(F.relu(self.linear1(x))))
        return self.norm3(x + self.dropout(y))


class PlainDetr(nn.Module):
    """DETR-R50 of torchvision's ResNet and PyTorch's attention, padding seen by the backbone as in official code."""

    def __init__(self):
        super().__init__()
        self.backbone = torchvision.models.resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
        del self.backbone.fc, self.backbone.avgpool
        self.position, self.project = SinePosition(DIM), nn.Conv2d(2048, DIM, 1)
        self.encoder = nn.ModuleList(PlainLayer(cross_attention=False) for _ in range(LAYERS))
        self.decoder = nn.ModuleList(PlainLayer(cross_attention=True) for _ in range(LAYERS))
        self.norm, self.query_embed = nn.LayerNorm(DIM), nn.Embedding(QUERIES, DIM)
        self.class_embed, self.bbox_embed = nn.Linear(DIM, CLASSES + 1), MLP(DIM, DIM, 4, 3)

    def forward(self, images: Tensor, padding_mask: Tensor) -> Predictions:
        """As of `models.detr.DETR`."""
        x, body = images, self.backbone
        for part in (body.conv1, body.bn1, body.relu, body.maxpool, body.layer1, body.layer2, body.layer3, body.layer4):
            x = part(x)
        padding = F.interpolate(padding_mask[None].float(), size=x.shape[-2:]).bool()[0]
        position = self.position(padding).flatten(2).permute(2, 0, 1)  # [K,B,E]
        memory, padding = self.project(x).flatten(2).permute(2, 0, 1), padding.flatten(1)
        for layer in self.encoder:
            memory = layer(memory, position, padding)
        query_position = self.query_embed.weight[:, None].repeat(1, len(images), 1)
        x, states = torch.zeros_like(query_position), []
        for layer in self.decoder:
            x = layer(x, query_position, padding, memory, memory + position)
            states.append(self.norm(x))
        state = torch.stack(states).transpose(1, 2)  # [layer,B,Q,E]
        boxes, logits = self.bbox_embed(state).sigmoid(), self.class_embed(state)
        layers = [Predictions(*outputs, "softmax") for outputs in zip(logits, boxes, strict=True)]
        last = layers.pop()
        last.auxiliary = layers
        return last


def plain_step(batch: Batch) -> Callable[[], Tensor]:
    """A step of the model in plain PyTorch."""
    model, criterion = PlainDetr(), Criterion()
    loss = lambda: criterion(model(batch.images, batch.mask()), batch.targets)[0]  # noqa: E731
    return _step(model.to(batch.images.device), r"backbone\.(conv1|layer1)\.", loss)


def transformers_model(kind: str, settings: dict[str, Any], backbone: dict[str, Any]) -> nn.Module:
    """A detector of transformers with a ResNet-50, weights drawn at random. Raises ImportError without transformers.

    kind: as transformers names it, detr or deformable_detr. settings, backbone: what is to differ from its defaults.
    """
    import transformers

    stages = ["stage4"] if kind == "detr" else ["stage2", "stage3", "stage4"]
    fixed = {"use_timm_backbone": False, "auxiliary_loss": True, "num_labels": CLASSES}
    fixed |= dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), DROPOUT)
    fixed["backbone_config"] = transformers.ResNetConfig(**backbone, out_features=stages)
    return transformers.AutoModelForObjectDetection.from_config(
        transformers.AutoConfig.for_model(kind, **fixed | settings)
    )


def transformers_step(batch: Batch, model: nn.Module, precision: str = "float32") -> Callable[[], Tensor]:
    """A step of a detector of transformers with the loss that it comes with."""
    device = batch.images.device
    labels = [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in batch.targets]
    given = {"pixel_values": batch.images, "pixel_mask": (~batch.mask()).long(), "labels": labels}

    def loss() -> Tensor:
        with autocast(precision, device):
            return model(**given).loss

    return _step(model.to(device), r"model\.backbone\..*(embedder\.|encoder\.stages\.0\.)", loss)


def _step(model: nn.Module, frozen: str, loss_of_batch: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A step with AdamW, in one pass on a GPU, and two rates, as in official code.

    frozen: names of parameters that are not trained; all others are, also of a backbone that comes wholly frozen.
    """
    model.train()
    rest, backbone = [], []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not re.match(frozen, name))
        (backbone if "backbone." in name else rest).append(parameter)
    backbone = [parameter for parameter in backbone if parameter.requires_grad]
    groups = [{"params": rest, "lr": 1e-4}, {"params": backbone, "lr": 1e-5}]
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-4, fused=True if rest[0].is_cuda else None)

    def step() -> Tensor:
        loss = loss_of_batch()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step
