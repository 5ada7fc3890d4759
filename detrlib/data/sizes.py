"""How large objects are beside what a cell of the feature map sees, and the image sizes that follow from it."""

import torch
from torch import Tensor

MOST = 0.9  # of the objects: the share that is to fit
FEWEST_CELLS = 2  # that an object is to be long


def suggested_image_sizes(sides: Tensor, stride: int, view: int) -> tuple[int, int]:
    """The range of `data.image_size` in which cells see most objects whole and most objects have cells of their own.

    Args:
        sides: longer sides of the objects in parts of the shorter side of their images, as of
            `CocoDataset.object_sides`; one or more.
        stride, view: of a backbone, in pixels, as of `detrlib.models.backbone_view`.

    Returns:
        The smallest size at which nine of ten objects are two cells long or more, and the largest at which nine of ten
        are no longer than what a cell sees; both 32 at least. Where the first is above the second no size does both.
    """
    smallest = FEWEST_CELLS * stride / torch.quantile(sides, 1 - MOST).item()
    largest = view / torch.quantile(sides, MOST).item()
    return max(32, round(smallest)), max(32, round(largest))
