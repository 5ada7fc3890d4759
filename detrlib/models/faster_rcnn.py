"""Faster R-CNN with a feature pyramid (Ren et al. 2015, Lin et al. 2017), torchvision's, as a model like the others.

It has no attention and is not trained here: it is what detection transformers are compared with, and so it gets the
same images, the same 100 detections and the same evaluation. Its weights are torchvision's (see checkpoints.py).

Legend: B images, Q detections of an image at most, C classes, of which 0 is the background and never predicted.
"""

from collections import defaultdict
from collections.abc import Collection

import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.image_list import ImageList
from torchvision.ops.misc import FrozenBatchNorm2d

from detrlib.boxes import xyxy_to_cxcywh
from detrlib.models.backbone import image_sizes
from detrlib.models.outputs import Predictions, Site

STRIDE = 32  # torchvision pads images to multiples of it
# Version -> torchvision's builder, and the eps of its batch norms: version 1 was trained without any.
VERSIONS = {
    "faster_rcnn": (detection.fasterrcnn_resnet50_fpn, 0.0),
    "faster_rcnn_v2": (detection.fasterrcnn_resnet50_fpn_v2, 1e-5),
}


class FasterRCNN(nn.Module):
    """torchvision's backbone, proposals and heads without its transform: images come resized, normalised and padded.

    version: "faster_rcnn" (fasterrcnn_resnet50_fpn) or "faster_rcnn_v2". Entries of the state dict have torchvision's
    names. What torchvision does with an image depends on the images beside it in three places: frozen norms fill the
    padding with values that convolutions see, anchors in the padding compete with those in the image, and the coarsest
    anchors are spaced by the size of the whole canvas. Here every image is computed on the canvas that torchvision
    gives it alone (images of one canvas together), so that its detections are those of torchvision for it alone, with
    which the published AP was measured, whatever the batch.
    """

    def __init__(self, version: str, num_classes: int, num_detections: int = 100):
        super().__init__()
        build, eps = VERSIONS[version]
        model = build(
            weights=None, weights_backbone=None, num_classes=num_classes, box_detections_per_img=num_detections
        )
        freeze_norms(model, eps)
        self.backbone, self.rpn, self.roi_heads = model.backbone, model.rpn, model.roi_heads
        for part in (self.backbone.body.conv1, self.backbone.body.layer1):  # as torchvision does with trained weights
            part.requires_grad_(False)
        self.num_classes = num_classes
        self.num_detections = num_detections

    def forward(
        self, images: Tensor, padding_mask: Tensor, need_attention: bool | Collection[Site] = False
    ) -> Predictions:
        """images [B,3,H,W], padding_mask [B,H,W] (True = padding) -> detections as queries, best first.

        need_attention: taken as other models take it; there is none, and `attention` is None.
        """
        sizes = image_sizes(padding_mask)
        alike = defaultdict(list)  # canvas -> the images that it fits
        for index, (height, width) in enumerate(sizes):
            alike[-(-height // STRIDE) * STRIDE, -(-width // STRIDE) * STRIDE].append(index)
        found = {}
        for canvas, members in alike.items():
            batch = images.new_zeros(len(members), 3, *canvas)
            for place, index in enumerate(members):
                height, width = sizes[index]
                batch[place, :, :height, :width] = images[index, :, :height, :width]
            found |= dict(zip(members, self._detect(batch, [sizes[index] for index in members]), strict=True))
        return self._packed([found[index] for index in range(len(sizes))], sizes, images)

    def _detect(self, images: Tensor, sizes: list[tuple[int, int]]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Boxes [n,4] (xyxy, pixels of `images`), scores [n] and labels [n] of every image, best first."""
        features = self.backbone(images)
        proposals, _ = self.rpn(ImageList(images, sizes), features)
        heads = self.roi_heads
        # The canvas, not the images' sizes: the pooler infers strides from it, once, and small images would mislead it.
        regions = heads.box_roi_pool(features, proposals, [tuple(images.shape[-2:])])
        logits, offsets = heads.box_predictor(heads.box_head(regions))
        return list(zip(*heads.postprocess_detections(logits, offsets, proposals, sizes), strict=True))

    def _packed(self, found: list[tuple[Tensor, ...]], sizes: list[tuple[int, int]], like: Tensor) -> Predictions:
        """Detections as queries with one possible class each; queries left over have score 0 for all classes."""
        logits = like.new_full((len(found), self.num_detections, self.num_classes), -torch.inf)
        boxes = like.new_full((len(found), self.num_detections, 4), 0.5)
        for image, ((corners, scores, labels), (height, width)) in enumerate(zip(found, sizes, strict=True)):
            number = torch.arange(len(scores), device=scores.device)
            logits[image, number, labels] = scores.logit()
            boxes[image, number] = xyxy_to_cxcywh(corners / corners.new_tensor([width, height, width, height]))
        return Predictions(logits, boxes, "sigmoid")


def freeze_norms(module: nn.Module, eps: float) -> None:
    """Put fixed batch norms in the place of those of `module` and all its parts, as torchvision has them once trained.

    Entries keep their names but for counters of batches, which published files of version 1 do not have.
    """
    for name, part in module.named_children():
        if isinstance(part, nn.BatchNorm2d):
            setattr(module, name, FrozenBatchNorm2d(part.num_features, eps))
        else:
            freeze_norms(part, eps)
