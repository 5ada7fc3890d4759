"""Backbones: torchvision's ResNets as DETR uses them, a thin one for the embedded data, and Swin-T (see swin.py).

Batch-norm statistics are frozen (buffers, not parameters): batches of detection are too small to estimate them. For
speed their scale is carried by the filters before them (`convolved`), padding is made zero only where a filter of more
than one cell looks next (`residual`), and convolutions lie in memory as they are fastest (`trained_layout`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.ops.misc import FrozenBatchNorm2d

from detrlib.errors import ConfigError
from detrlib.models.checkpointing import call
from detrlib.models.pretrained import imagenet_weights, load_backbone_weights, read_weights
from detrlib.models.swin import DEPTHS, PATCH, WIDTHS, WINDOW, swin_body, swin_stages

CAPABILITY, ONEDNN = torch.backends.cpu.get_cpu_capability(), torch.backends.mkldnn.is_available()  # graphs cannot ask


@dataclass
class FeatureMap:
    """One level of a backbone."""

    features: Tensor  # [B,C,h,w]
    padding: Tensor | None  # [B,h,w], True = padding; None: there is none

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w)."""
        return tuple(self.features.shape[-2:])

    @property
    def key_padding(self) -> Tensor | None:
        """Padding of the cells, row by row, [B,h*w]."""
        return None if self.padding is None else self.padding.flatten(1)

    def position_mask(self) -> Tensor:
        """What encodings of positions are made from: padding, or [1,h,w] without any, where one does for all images."""
        if self.padding is not None:
            return self.padding
        return torch.zeros(1, *self.grid, dtype=torch.bool, device=self.features.device)


class Backbone(nn.Module):
    """Images [B,3,H,W] and their padding [B,H,W] or None -> feature maps of `stages` (1 to 4), fine to coarse.

    num_channels: of each of these maps. What is outside an image is zero wherever a filter looks there, as the
    convolutions' own zero padding is, so that an image gives the same features alone and in a padded batch.
    official_padding: as in the official code, padding is an image like any other, and its masks are shrunk otherwise.
    """

    def __init__(self, body: nn.Module, stages: Sequence[int] = (4,), official_padding: bool = False):
        super().__init__()
        self.body = body.to(memory_format=torch.channels_last)
        for part in (body.layer2, body.layer3, body.layer4) if isinstance(body, ResNet) else ():
            part.to(memory_format=trained_layout(torch.device("cpu")))  # where models are built
        self.stages = tuple(stages)
        self.num_channels = [stage_channels(body, stage) for stage in self.stages]
        self.official_padding = official_padding
        self.recompute = False  # see `checkpoint_activations`

    def forward(self, images: Tensor, padding: Tensor | None) -> list[FeatureMap]:
        own = None if self.official_padding else padding  # of which nothing may be seen
        again = self.recompute and self.training
        if isinstance(self.body, SwinTransformer):
            sizes = None if own is None else valid_sizes(own)
            maps = swin_stages(self.body, images, own, sizes, self.official_padding, again)
        else:
            maps = residual_stages(self.body, images, own, again)
        levels = []
        for number, (x, outside) in enumerate(maps, start=1):
            if number not in self.stages:
                continue
            if outside is not None:
                x = x.masked_fill(outside[:, None], 0.0)
            elif padding is not None:
                outside = nearest_mask(padding, x.shape[-2:])
            levels.append(FeatureMap(x, outside))
        return levels


def residual_stages(
    body: nn.Module, images: Tensor, padding: Tensor | None = None, again: bool = False
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Maps of the four stages of a ResNet-like body, each with the padding of its cells, which is not made zero.

    A cell belongs to an image if its first pixel does.

    Args:
        body: of torchvision, or a `TinyBody`.
        images: [B,3,H,W].
        padding: [B,H,W], True = no convolution is to see it; None: there is none.
        again: of every block, keep the input only.
    """
    x = images if padding is None else images.masked_fill(padding[:, None], 0.0)
    x = convolved(body.conv1, body.bn1, x.contiguous(memory_format=torch.channels_last))
    padding = _shrunk(padding, body.conv1)
    x = body.maxpool(rectified(x, padding))
    if isinstance(body.maxpool, nn.MaxPool2d):
        padding = _shrunk(padding, body.maxpool)
        if padding is not None and isinstance(body.layer1[0], BasicBlock):
            x = x.masked_fill(padding[:, None], 0.0)  # windows reach from just outside an image into it
    for stage in (body.layer1, body.layer2, body.layer3, body.layer4):
        if stage is body.layer2 and isinstance(body, ResNet):
            x = x.contiguous(memory_format=trained_layout(x.device))
        for block in stage:
            x, padding = call(residual, block, x, padding, again=again)
        yield x, padding


def residual(block: BasicBlock | Bottleneck, x: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A residual block of torchvision, to whose 3 x 3 convolutions padding is zero: x and padding after it.

    Basic blocks begin with such a convolution: what they are given must be zero in padding, and so is what they return.
    """
    shortcut = x if block.downsample is None else convolved(*block.downsample, x)
    if isinstance(block, Bottleneck):
        x = rectified(convolved(block.conv1, block.bn1, x), padding)
        x, padding = rectified(convolved(block.conv2, block.bn2, x)), _shrunk(padding, block.conv2)
        return rectified(convolved(block.conv3, block.bn3, x).add_(shortcut)), padding
    padding = _shrunk(padding, block.conv1)
    x = rectified(convolved(block.conv1, block.bn1, x), padding)
    return rectified(convolved(block.conv2, block.bn2, x).add_(shortcut), padding), padding


def _shrunk(padding: Tensor | None, window: nn.Conv2d | nn.MaxPool2d) -> Tensor | None:
    """Padding [B,h,w] of the cells that `window` makes of those before."""
    step = _side(window.stride)
    return padding if padding is None or step == 1 else padding[:, ::step, ::step]


def rectified(x: Tensor, padding: Tensor | None = None) -> Tensor:
    """ReLU of x [B,C,h,w], which it takes the place of, and zero in padding [B,h,w]."""
    if padding is not None:  # ReLU makes zero of -inf, and of the gradient there: no pass of its own over either
        x = x.add_(torch.zeros_like(padding, dtype=x.dtype).masked_fill_(padding, -torch.inf)[:, None])
    return x.relu_()


def convolved(conv: nn.Conv2d, norm: FrozenBatchNorm2d, x: Tensor) -> Tensor:
    """norm(conv(x)) in one pass: a frozen norm is a fixed scale and shift per channel, which the filters can carry."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    weight, bias = conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale
    dilation = conv.dilation
    if x.is_cpu and _side(conv.kernel_size) == 1 and ONEDNN:
        # One cell cannot be dilated, but convolutions said to be go to oneDNN, which with one thread is faster by up
        # to a quarter than where PyTorch sends small batches otherwise.
        dilation = 2
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, dilation, conv.groups)


def trained_layout(device: torch.device) -> torch.memory_format:
    """The layout in which convolutions of the later stages of torchvision's ResNets are fastest, forward and backward.

    It is channels-last, but for processors without AVX-512: there the gradients of 3 x 3 filters take a third longer in
    it, and those with stride 2 three times as long. The stem and the first stage, in DETR not trained, are faster in it
    everywhere. See `detrlib benchmark step`.
    """
    slow = device.type == "cpu" and CAPABILITY == "AVX2"
    return torch.contiguous_format if slow else torch.channels_last


def nearest_mask(padding: Tensor, grid: Sequence[int]) -> Tensor:
    """Padding [B,H,W] of a grid (h, w) as the official code has it: of the pixel at each cell's share of the batch.

    Where strides do not divide the size of the batch, that pixel is not the first one of the cell.
    """
    return F.interpolate(padding[None].float(), size=tuple(grid)).bool()[0]


def valid_sizes(padding: Tensor) -> Tensor:
    """(height, width) [B,2] of the images in the upper left corners of a padded batch [B,H,W]."""
    valid = ~padding
    return torch.stack([valid[:, :, 0].sum(1), valid[:, 0].sum(1)], 1)


def image_sizes(padding: Tensor) -> list[tuple[int, int]]:
    """The same as numbers, for which a GPU is waited for."""
    return [tuple(size) for size in valid_sizes(padding).tolist()]


def stage_channels(body: nn.Module, stage: int) -> int:
    """Channels that stage number `stage` (1 to 4) of a body ends with."""
    if isinstance(body, SwinTransformer):
        return WIDTHS[stage - 1]
    block = getattr(body, f"layer{stage}")[-1]
    return (block.conv3 if isinstance(block, Bottleneck) else block.conv2).out_channels


class TinyBody(nn.Module):
    """A thin ResNet of four single-block stages and stride 8, for small images on a CPU; a cell sees 100 pixels."""

    channels = (16, 32, 64, 64, 64)
    strides = (2, 2, 1, 1)

    def __init__(self, norm: type[nn.Module] = FrozenBatchNorm2d):
        super().__init__()
        stem, *widths = self.channels
        self.conv1 = nn.Conv2d(3, stem, 3, stride=2, padding=1, bias=False)
        self.bn1 = norm(stem)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity()
        previous = stem
        for number, (width, stride) in enumerate(zip(widths, self.strides, strict=True), start=1):
            self.add_module(f"layer{number}", nn.Sequential(_basic_block(previous, width, stride, norm)))
            previous = width
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _basic_block(before: int, after: int, stride: int, norm: type[nn.Module]) -> BasicBlock:
    shortcut = None
    if stride > 1 or before != after:
        shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride=stride, bias=False), norm(after))
    return BasicBlock(before, after, stride, shortcut, norm_layer=norm)


def build_body(
    name: str, dilation: bool, norm: type[nn.Module] = FrozenBatchNorm2d, stages: Sequence[int] = (4,)
) -> nn.Module:
    """The network called `name` without weights. stages: whose maps are used; those of Swin-T get a norm each."""
    if dilation and name not in ("resnet50", "resnet101"):
        raise ConfigError(f"model.backbone.dilation needs bottleneck blocks, which {name} has not; use resnet50")
    if name == "tiny":
        return TinyBody(norm)
    if name == "swin_t":
        return swin_body(stages)
    body = getattr(torchvision.models, name)(
        weights=None, replace_stride_with_dilation=[False, False, dilation], norm_layer=norm
    )
    del body.fc, body.avgpool
    return body


def build_backbone(
    name: str,
    weights: str | Path = "none",
    dilation: bool = False,
    freeze_stem: bool | None = None,
    official_padding: bool = False,
    stages: Sequence[int] = (4,),
) -> Backbone:
    """A backbone by name; `weights` is "none", "imagenet" (torchvision's) or the path of a state dict.

    stages: whose feature maps are returned. freeze_stem: stem and first stage are not trained, as in DETR; None: just
    when there are weights to keep. Of Swin-T the merging of patches after the first stage belongs to them, as in Sparse
    DETR.
    """
    body = build_body(name, dilation, stages=stages)
    if str(weights) != "none":
        state = imagenet_weights(name) if weights == "imagenet" else read_weights(Path(weights))
        load_backbone_weights(body, state, weights)
    if freeze_stem or (freeze_stem is None and str(weights) != "none"):
        for part in body.features[:3] if name == "swin_t" else (body.conv1, body.layer1):
            part.requires_grad_(False)
    return Backbone(body, stages, official_padding)


class CellView(NamedTuple):
    """What a cell of a feature map stands for, and what it can see, both in pixels along a side."""

    stride: int
    view: int


def cell_view(name: str, dilation: bool = False) -> CellView:
    """Stride and receptive field of the last stage of the backbone called `name`; Araujo et al. 2019, Eq. 2.

    What a cell sees of an image without attention. The middle of it counts most.
    """
    with torch.device("meta"):
        body = build_body(name, dilation)
    stride = view = 1
    for size, step in _looks(body):
        stride, view = stride * step, view + (size - 1) * stride
    return CellView(stride, view)


def measured_view(backbone: nn.Module, length: int = 2048) -> CellView:
    """Stride and receptive field of the last stage of a convolutional backbone of transformers, which is changed.

    What a cell sees, `length` pixels at most, is where the image has a gradient, once no weight is negative and
    maxima are means. Of our ResNets it is what `cell_view` computes.
    """
    for module in list(backbone.modules()):
        for name, pool in module.named_children():
            if isinstance(pool, nn.MaxPool2d):
                setattr(module, name, nn.AvgPool2d(pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode))
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 1 / module.weight[0].numel())
    strip = torch.ones(1, 3, 32, length, dtype=torch.double, requires_grad=True)
    last = backbone.double().eval()(strip).feature_maps[-1]
    last[..., last.shape[-1] // 2].sum().backward()
    return CellView(length // last.shape[-1], int((strip.grad[0].sum((0, 1)) != 0).sum()))


def _looks(body: nn.Module) -> Iterator[tuple[int, int]]:
    """(size, step) of the windows that one cell looks through one after the other, in cells of the map before."""
    if isinstance(body, SwinTransformer):
        for number, depth in enumerate(DEPTHS):
            yield (2, 2) if number else (PATCH, PATCH)
            yield from [(2 * WINDOW - 1, 1)] * depth  # the cell at one end of a window sees the one at the other
        return
    shortcuts = [block.downsample for stage in (body.layer1, body.layer2, body.layer3, body.layer4) for block in stage]
    skipped = {module for shortcut in shortcuts if shortcut is not None for module in shortcut}
    for module in body.modules():
        if isinstance(module, nn.Conv2d | nn.MaxPool2d) and module not in skipped:
            size, step, dilation = (_side(getattr(module, what)) for what in ("kernel_size", "stride", "dilation"))
            yield dilation * (size - 1) + 1, step


def _side(value: int | tuple[int, int]) -> int:
    return value if isinstance(value, int) else value[0]
