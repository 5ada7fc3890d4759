"""What a model costs: parameters, multiply-adds and time, by component.

    cost_table({"mine": model}, (800, 1066))          one row per model and component

One multiply-add is one FLOP, as in the tables of DETR and its successors: convolutions, linear layers, the two products
of attention and the interpolation inside deformable attention are counted, other transforms than softmax as if they
were softmax. Normalisation, activations and sums are not. Nothing is computed: sizes alone run through the model.
"""

import copy
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry
from torch.utils.module_tracker import ModuleTracker

from detrlib.attention.transforms import Softmax, Transform
from detrlib.models.faster_rcnn import FasterRCNN

PUBLISHED_SIZE = (850, 1040)
ATEN = torch.ops.aten
REST = "rest"  # what is in no component: queries, level embeddings

# Where a module belongs, by the beginning of its path, first match first: heads also work inside the decoder.
COMPONENTS = {
    "class_embed": "heads",
    "bbox_embed": "heads",
    "roi_heads": "heads",
    "rpn": "proposals",
    "transformer.enc_output": "proposals",
    "transformer.pos_trans": "proposals",
    "transformer.enc_mask_predictor": "scoring",
    "transformer.decoder": "decoder",
    "transformer.encoder": "encoder",
    "input_proj": "input projection",
    "backbone.fpn": "input projection",
    "backbone": "backbone",
}
ORDER = ("backbone", "input projection", "scoring", "encoder", "proposals", "decoder", "heads", REST)


def component_of(path: str) -> str:
    """The component of the module or parameter at a dotted path."""
    return next(
        (name for prefix, name in COMPONENTS.items() if f"{path}.".startswith((f"{prefix}.", f"{prefix}_"))), REST
    )


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
    (see published.py). Tokens that a sparse encoder leaves out are not counted. Of Faster R-CNN
    everything is counted that does not depend on what is in the image, with as many proposals as it lets through at
    most.
    """
    fake = FakeTensorMode()
    twin = _without_weights(model, fake)
    if isinstance(twin, FasterRCNN):
        twin.forward = _layers_of(twin, fake)
    with fake:
        images = torch.empty(1, 3, *size)
    # Attention as two products, whichever kernels there are.
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        ModuleTracker() as tracker,
        _Counting(fake, tracker, elementwise or {}) as counting,
    ):
        twin(images, None)
    return {name: counting.counts[name] for name in ORDER}


def _without_weights(model: nn.Module, fake: FakeTensorMode) -> nn.Module:
    """A copy of a model whose tensors have sizes but no content, and whose transforms need none."""
    twin = copy.deepcopy(model).to("meta").eval()
    for module in list(twin.modules()):
        if isinstance(getattr(module, "transform", None), Transform):
            module.transform = Softmax()
        for tensors in (module._parameters, module._buffers):
            for name, value in tensors.items():
                if value is not None:
                    with fake:
                        tensors[name] = torch.empty(value.shape, dtype=value.dtype)
    return twin


def _layers_of(model: FasterRCNN, fake: FakeTensorMode) -> Callable[[Tensor, Tensor], None]:
    """A forward pass of Faster R-CNN that chooses no regions, which takes content, but looks at as many as it may."""
    with fake:
        size = model.roi_heads.box_roi_pool.output_size
        regions = torch.empty(model.rpn.post_nms_top_n(), model.backbone.out_channels, *size)

    def forward(images: Tensor, padding: None) -> None:
        model.rpn.head(list(model.backbone(images).values()))
        model.roi_heads.box_predictor(model.roi_heads.box_head(regions))

    return forward


class _Counting(TorchDispatchMode):
    """Counts multiply-adds by component, and lets tensors with and without content meet.

    What is computed from the padding alone, such as how many tokens are kept, has real values.
    """

    def __init__(self, fake: FakeTensorMode, tracker: ModuleTracker, elementwise: Mapping[Any, int]):
        super().__init__()
        self.fake, self.tracker, self.elementwise = fake, tracker, elementwise
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """One operation: run it on sizes if any of its tensors has no content, and count it."""
        kwargs = kwargs or {}
        if any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs))):
            args, kwargs = tree_map_only(Tensor, self._without_content, (args, kwargs))
        result = func(*args, **kwargs)
        operator = func._overloadpacket
        count = 0
        if operator in self.elementwise:
            count = self.elementwise[operator] * tree_leaves(result)[0].numel()
        elif operator in flop_registry:
            count = flop_registry[operator](*args, **kwargs, out_val=result) // 2  # torch counts both operations
        elif operator in (ATEN._embedding_bag, ATEN._embedding_bag_forward_only):
            table, indices = args[:2]  # deformable attention adds up weighted rows of values
            count = indices.numel() * table.shape[1]
        if count:
            self.counts[self._component()] += count
        return result

    def _without_content(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor)

    def _component(self) -> str:
        """Of all modules at work, the one whose component comes first."""
        paths = [path.partition(".")[2] for path in self.tracker.parents]
        found = {component_of(path) for path in paths}
        return next((name for name in dict.fromkeys(COMPONENTS.values()) if name in found), REST)


def measure_latency(
    model: nn.Module, size: tuple[int, int] = PUBLISHED_SIZE, batch: int = 1, repeats: int = 10, warm_up: int = 3
) -> dict[str, float]:
    """Median milliseconds of every component and of the whole ("total") for a batch of random images of `size`.

    On the model's device, in evaluation mode, without gradients; the first `warm_up` passes are not counted. Times of
    components are taken in passes of their own, which wait for the device at every border; the total is not slowed so.
    """
    device = next(model.parameters()).device
    inputs = torch.rand(batch, 3, *size, device=device), torch.zeros(batch, *size, dtype=torch.bool, device=device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            totals = [_timed(lambda: model(*inputs), device) for _ in range(warm_up + repeats)][warm_up:]
            with _stopwatch(model, device) as spent:
                parts = []
                for _ in range(repeats):
                    spent.clear()
                    whole = _timed(lambda: model(*inputs), device)
                    parts.append({**spent, REST: whole - sum(spent.values())})
    finally:
        model.train(training)
    medians = {name: 1000 * statistics.median(part.get(name, 0.0) for part in parts) for name in ORDER}
    return medians | {"total": 1000 * statistics.median(totals)}


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds that `run` takes, until the device has finished."""
    start = _now(device)
    run()
    return _now(device) - start


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def _stopwatch(model: nn.Module, device: torch.device) -> Iterator[Counter[str]]:
    """Seconds by component, of every forward pass within; a component within another is not counted twice."""
    spent: Counter[str] = Counter()
    running = []  # components at work, outermost first
    last = [0.0]

    def switch() -> None:
        now = _now(device)
        if running:
            spent[running[-1]] += now - last[0]
        last[0] = now

    def watched(name: str, forward: Callable) -> Callable:
        def run(*args, **kwargs):
            switch()
            running.append(name)
            try:
                return forward(*args, **kwargs)
            finally:
                switch()
                running.pop()

        return run

    modules = [(component_of(path), module) for path, module in model.named_modules() if component_of(path) != REST]
    for name, module in modules:
        module.forward = watched(name, module.forward)
    try:
        yield spent
    finally:
        for _, module in modules:
            del module.forward


def cost_table(
    models: Mapping[str, nn.Module], size: tuple[int, int] = PUBLISHED_SIZE, latency: bool = False, **measuring
) -> pd.DataFrame:
    """Costs of models for an image of `size`, tidy: columns model, component, parameters, frozen, gflops.

    One row for each component that a model has, and one called "total". latency: also measure milliseconds, with
    `measuring` as in `measure_latency`.
    """
    rows = []
    for label, model in models.items():
        parameters, flops = count_parameters(model), count_flops(model, size)
        times = measure_latency(model, size, **measuring) if latency else {}
        for name in (*ORDER, "total"):
            trained, frozen = (sum(column) for column in zip(*_of(parameters, name), strict=True))
            count = sum(_of(flops, name))
            if name == "total" or trained or frozen or count:
                row = {
                    "model": label,
                    "component": name,
                    "parameters": trained,
                    "frozen": frozen,
                    "gflops": count / 1e9,
                }
                rows.append(row | ({"milliseconds": times[name]} if latency else {}))
    return pd.DataFrame(rows)


def _of(values: Mapping[str, Any], name: str) -> list:
    """The value of a component, or of all of them for the total."""
    return list(values.values()) if name == "total" else [values[name]]
