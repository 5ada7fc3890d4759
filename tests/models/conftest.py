"""Small models of the families, and parts of them, that several test files build.

Legend: B images, L levels, S tokens of all levels.
"""

import pytest
import torch
from torch import nn

from detrlib.data import collate
from detrlib.models.backbone import FeatureMap
from detrlib.models.position import SinePosition
from detrlib.models.pyramid import flattened

REFINE = {"refine": True}
TWO_STAGE = REFINE | {"two_stage": True}
EFFICIENT = TWO_STAGE | {"query_init": "memory", "class_specific_proposals": True}
SPARSE = EFFICIENT | {"rho": 0.3, "encoder_auxiliary": True}
VARIANTS = {"plain": {}, "refine": REFINE, "two-stage": TWO_STAGE, "efficient": EFFICIENT, "sparse": SPARSE}
TINY = {"levels": 2, "stages": [1, 4], "encoder_points": 3, "decoder_points": 2}


@pytest.fixture(scope="session")
def frozen():
    def frozen(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters() if not p.requires_grad)

    return frozen


@pytest.fixture(scope="session")
def assert_alone_as_in_batch(padded_batch):
    def assert_alone_as_in_batch(model: nn.Module) -> None:
        """Every layer's predictions of an image alone are those of the same image in a padded batch."""
        sizes, canvas = [(70, 101), (128, 64), (97, 160)], (128, 160)
        images, padding = padded_batch(*sizes, canvas=canvas)
        with torch.no_grad():
            together = model(images, padding)
            for i, (height, width) in enumerate(sizes):
                alone = model(images[i : i + 1, :, :height, :width], padding[i : i + 1, :height, :width])
                for one, all_of_them in zip((*alone.auxiliary, alone), (*together.auxiliary, together), strict=True):
                    torch.testing.assert_close(one.logits[0], all_of_them.logits[i], rtol=0, atol=1e-4)
                    torch.testing.assert_close(one.boxes[0], all_of_them.boxes[i], rtol=0, atol=1e-4)
        assert (together.logits[0] - together.logits[1]).abs().max() > 1e-2  # images matter

    return assert_alone_as_in_batch


@pytest.fixture(scope="session")
def deformable(small):
    def deformable(variant: str = "plain", options: dict | None = None, **settings) -> nn.Module:
        """A small model of a variant: stages of stride 4 and 8 of the tiny backbone."""
        options = TINY | VARIANTS[variant] | (options or {})
        encoder_layers = 3 if options.get("encoder_auxiliary") else 2
        defaults = {"architecture": "deformable", "classification": "sigmoid", "encoder_layers": encoder_layers}
        return small(**defaults | {"decoder_layers": 4, "deformable": options} | settings)

    return deformable


@pytest.fixture(scope="session")
def pyramid_of():
    def pyramid_of(*maps: torch.Tensor):
        """A pyramid of zeros over paddings [B,h,w]."""
        levels = [FeatureMap(torch.zeros(len(padding), 8, *padding.shape[1:]), padding) for padding in maps]
        return flattened(levels, SinePosition(8, centred=True), torch.arange(len(maps) * 8.0).view(len(maps), 8))

    return pyramid_of


@pytest.fixture(scope="session")
def half_padded():
    def half_padded() -> torch.Tensor:
        """[2,4,8]: the second image covers the left half and the upper three rows."""
        padding = torch.zeros(2, 4, 8, dtype=torch.bool)
        padding[1, :, 4:] = padding[1, 3:] = True
        return padding

    return half_padded


@pytest.fixture(scope="session")
def assert_as_transformers():
    @torch.no_grad()
    def assert_as_transformers(official: nn.Module, reference: nn.Module, exact: nn.Module, *sizes: tuple[int, int]):
        """The same weights give the same logits and boxes on images of odd sizes, in batches as `collate` makes them.

        `official` predicts a batch as `reference` does; `exact` predicts every image of it as `reference` does alone.
        Batches of the reference are those of its own processor. In double precision: features of random weights are so
        large that float32 would round by more.
        """
        transformers = pytest.importorskip("transformers")
        processor = transformers.DetrImageProcessor(do_resize=False, do_rescale=False, do_normalize=False)
        generator = torch.Generator().manual_seed(1)
        images = [torch.randn(3, *size, generator=generator) for size in sizes]
        exact.load_state_dict(official.state_dict())
        for model in (official, reference, exact):
            model.double().eval()

        def theirs(images):
            given = processor(images=images, return_tensors="pt")
            return reference(pixel_values=given["pixel_values"].double(), pixel_mask=given["pixel_mask"])

        def ours(model, images):
            batch = collate([(image, {}) for image in images])
            return model(batch.images.double(), batch.padding_mask)

        def assert_close(found, number, expected, row):
            torch.testing.assert_close(found.logits[number], expected.logits[row], rtol=0, atol=1e-5)
            boxes = expected.pred_boxes[row]
            torch.testing.assert_close(found.boxes[number], boxes, rtol=0, atol=1e-5, check_dtype=False)

        expected, together, independent = theirs(images), ours(official, images), ours(exact, images)
        for number, image in enumerate(images):
            alone = theirs([image])
            assert_close(together, number, expected, number)
            assert_close(independent, number, alone, 0)
            for model in (official, exact):
                assert_close(ours(model, [image]), 0, alone, 0)
            if image.shape[1:] != together_shape(images):  # the reference depends on the batch, so that this was a test
                assert (alone.logits[0] - expected.logits[number]).abs().max() > 1e-3

    def together_shape(images):
        return tuple(max(image.shape[axis] for image in images) for axis in (1, 2))

    return assert_as_transformers


@pytest.fixture(scope="session")
def transformers_backbone_name():
    def transformers_backbone_name(name: str) -> str:
        """torchvision's name of a ResNet parameter -> the name in `transformers`."""
        *place, kind = name.split(".")
        names = {"conv": "convolution", "bn": "normalization", "0": "convolution", "1": "normalization"}
        if len(place) == 1:
            path = f"embedder.embedder.{names[place[0][:-1]]}"
        else:
            path = f"encoder.stages.{int(place[0][-1]) - 1}.layers.{place[1]}."
            layer = place[2]
            if layer == "downsample":
                path += f"shortcut.{names[place[3]]}"
            else:
                path += f"layer.{int(layer[-1]) - 1}.{names[layer[:-1]]}"
        return f"backbone.model.{path}.{kind}"

    return transformers_backbone_name
