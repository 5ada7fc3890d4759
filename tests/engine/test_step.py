"""A batch in parts gives the update of the whole, and one that is no number gives none."""

import copy

import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from detrlib.data import collate
from detrlib.engine.step import Pending, _unless, train_step
from detrlib.errors import NonFiniteLoss
from detrlib.losses import Criterion, matcher
from detrlib.losses import criterion as criterion_module
from detrlib.losses.matcher import on_device

SIZES = ((64, 96), (80, 64), (48, 48), (64, 64), (40, 80))
PYRAMID = {"levels": 2, "stages": [3, 4], "two_stage": True, "refine": True, "encoder_auxiliary": True}
FAMILIES = {
    "softmax": {"attention": {"encoder_self": "entmax15", "decoder_cross": "alpha_entmax"}},
    "sigmoid": {"classification": "sigmoid", "queries": "anchor"},
    "polled": {"polling": {"ratio": 0.4, "pooled": 5}},
    "sparse encoder": {"architecture": "deformable", "deformable": PYRAMID | {"rho": 0.3}},
    "official padding": {"compatibility": {"padding": "official"}},
}


NO_WAIT = FAMILIES | {
    "softmax": {},
    "swin": {"backbone": {"name": "swin_t", "weights": "none"}},
    "conditional": {"queries": "conditional", "position": "learned"},
    "deformable": {"architecture": "deformable", "deformable": {"levels": 2, "stages": [3, 4]}},
}
WAITS = ("local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "repeat_interleave")
SENDS = ("lift_fresh",)  # torch.tensor(numbers): sent to a GPU, it is waited for


class WithoutWaiting(TorchDispatchMode):
    """Refuses operations for whose result a GPU would be waited for, or whose shape depends on numbers."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation._schema.name.partition("::")[2].lstrip("_")
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        masks = any(getattr(each, "dtype", None) is torch.bool for each in indices)
        assert not masks and not name.startswith((*WAITS, *SENDS)), name
        return operation(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def batch(random_boxes):
    """Five images of different sizes, one without boxes and one with more of them than there are queries."""
    torch.manual_seed(0)
    samples = []
    for size, number in zip(SIZES, (2, 0, 9, 1, 3), strict=True):
        target = {"labels": torch.randint(5, (number,)), "boxes": random_boxes(number)}
        samples.append((torch.randn(3, *size), target))
    return collate(samples)


def trained(model, batch, size, steps=3, **settings):
    """A copy of the model after some updates by a batch in parts of `size`, and what the steps returned."""
    model = copy.deepcopy(model).to(Accelerator().device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    parts = batch.split(size, keep_padding=getattr(model.backbone, "official_padding", False))
    given = model, parts, Criterion(weight_poll=1.0), optimizer, Accelerator()
    return model, [train_step(*given, clip_norm=0.1, **settings) for _ in range(steps)]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("settings", FAMILIES.values(), ids=FAMILIES)
def test_parts_of_a_batch_give_the_update_of_the_whole(settings, size, batch, small):
    start = small(**settings, dropout=0.0)
    (whole, expected), (model, terms) = trained(start, batch, 5), trained(start, batch, size)
    for first, second in zip(expected, terms, strict=True):
        assert {k: v.item() for k, v in second.items()} == pytest.approx({k: v.item() for k, v in first.items()}, 1e-4)
    assert expected[-1]["loss"] < expected[0]["loss"]
    # Against the length of the update: a ReLU that rounding turns on or off, on some machines, makes 0.2 % of it.
    weights = start.named_parameters(), whole.parameters(), model.parameters()
    for (name, before), one, other in zip(*weights, strict=True):
        assert (other - one).norm() <= 1e-2 * (one - before).norm() + 1e-6, name


@pytest.mark.gpu
@pytest.mark.parametrize("settings", FAMILIES.values(), ids=FAMILIES)
def test_a_gpu_gives_the_update_of_the_cpu(settings, batch, small, request):
    start = small(**settings, dropout=0.0)
    whole, (expected,) = trained(start, batch, 5, steps=1)
    device = request.getfixturevalue("gpu").type
    model, (terms,) = trained(start, batch, 5, steps=1)
    assert {k: v.item() for k, v in terms.items()} == pytest.approx({k: v.item() for k, v in expected.items()}, 1e-4)
    for (name, weight), other in zip(whole.named_parameters(), model.parameters(), strict=True):
        assert other.device.type == device
        torch.testing.assert_close(other.cpu(), weight, rtol=1e-4, atol=1e-5, msg=name)
    rounded = trained(start, batch, 5, steps=1, precision="bfloat16")[1][0]["loss"].item()
    assert rounded == pytest.approx(expected["loss"].item(), 0.1)


def test_a_later_part_that_is_no_number_leaves_the_weights(batch, small):
    model = small(dropout=0.0).train()
    optimizer, before = torch.optim.AdamW(model.parameters()), copy.deepcopy(model.state_dict())
    parts = batch.split(2)
    parts[1].pixels[0, 0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteLoss, match="loss is nan"):
        train_step(model, parts, Criterion(), optimizer, Accelerator())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    parts[1].pixels[0, 0, 0, 0] = 0.0
    assert train_step(model, parts, Criterion(), optimizer, Accelerator())["loss"].isfinite()


@pytest.mark.parametrize("clip_norm", [0.0, 0.1])
def test_gradients_that_are_no_numbers_leave_the_weights_too(clip_norm, batch, small):
    """Where the loss is one, as where a root is taken of zero; the next update is made."""
    model = small(dropout=0.0).train().to(Accelerator().device)
    optimizer, before = torch.optim.AdamW(model.parameters(), fused=True), copy.deepcopy(model.state_dict())
    given = model, [batch], Criterion(), optimizer, Accelerator()
    broken = model.class_embed.bias.register_hook(lambda gradient: gradient * torch.nan)
    pending = Pending()  # of a GPU, which the CPU does not wait for
    with pytest.raises(NonFiniteLoss, match="gradient norm is nan"):
        train_step(*given, clip_norm=clip_norm, pending=pending)
        pending.read()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    broken.remove()
    assert train_step(*given, clip_norm=clip_norm)["grad_norm"].isfinite()
    assert not torch.equal(model.class_embed.bias, before["class_embed.bias"])


def test_the_norm_of_gradients_is_told_with_and_without_clipping(batch, small):
    norms = []
    for clip_norm in (0.0, 0.1):
        model = small(dropout=0.0).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        norms.append(
            train_step(model, [batch], Criterion(), optimizer, Accelerator(), clip_norm=clip_norm)["grad_norm"]
        )
        own = torch.stack([weight.grad.norm() for weight in model.parameters() if weight.grad is not None]).norm()
        assert own.item() == pytest.approx(0.1 if clip_norm else norms[0].item(), rel=1e-4)
    torch.testing.assert_close(*norms)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_fused_optimiser_skips_what_is_no_number(kind):
    """And goes on as if the update had not been tried."""
    weights = {}
    for tries in ([False, False], [False, True, False]):
        weight = torch.ones(3, requires_grad=True)
        optimizer = kind([weight], lr=0.1, fused=True)
        for skip in tries:
            weight.grad = torch.full((3,), torch.nan if skip else 0.5)
            with _unless(torch.tensor(skip), optimizer):
                optimizer.step()
        weights[len(tries)] = weight.detach()
    torch.testing.assert_close(weights[3], weights[2])
    assert not torch.equal(weights[2], torch.ones(3))


def test_what_is_no_number_is_told_when_it_is_read_and_once():
    pending = Pending()
    pending.read()
    assert pending.note({"loss": torch.tensor(1.0)})
    pending.read()
    finite = pending.note({"loss": torch.tensor(2.0), "gradient norm": torch.tensor(torch.inf)}, "step 3: {}".format)
    assert not finite
    with pytest.raises(NonFiniteLoss, match="step 3: gradient norm is inf"):
        pending.read()
    pending.read()


@pytest.mark.parametrize("settings", NO_WAIT.values(), ids=NO_WAIT)
def test_forward_and_loss_ask_for_no_number(settings, batch, small, monkeypatch):
    """But for the costs of matching, which are sent to the CPU. (Rules that transforms follow on a CPU ask there.)"""

    def sent(*given):  # which on a GPU does not wait
        with _disable_current_modes():
            return on_device(*given)

    for module in (matcher, criterion_module):
        monkeypatch.setattr(module, "on_device", sent)
    model, criterion = small(**settings).train(), Criterion()
    with WithoutWaiting():
        loss, _ = criterion(model(batch.images, batch.padding_mask), batch.targets)
    assert loss.isfinite()


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [FAMILIES["softmax"], *NO_WAIT.values()], ids=["entmax", *NO_WAIT])
def test_a_step_on_a_gpu_waits_for_nothing_but_matching(settings, batch, small, gpu):
    """The matcher waits for an event of its own, which torch does not count; a wait for all that is queued, it does."""
    accelerator, pending, pinned = Accelerator(), Pending(), batch.to("cpu")
    try:
        pinned = type(batch)(batch.pixels.pin_memory(), batch.padding_mask.pin_memory(), pinned.targets)
        for target in pinned.targets:
            target |= {name: value.pin_memory() for name, value in target.items()}
        model = small(**settings).train().to(gpu)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        given = model, [pinned], Criterion(), optimizer, accelerator
        train_step(*given, clip_norm=0.1, pending=pending)  # which prepares things
        torch.cuda.set_sync_debug_mode("error")
        terms = [train_step(*given, clip_norm=0.1, pending=pending) for _ in range(3)]
        torch.cuda.set_sync_debug_mode("default")
        pending.read()
        assert all(term["loss"].isfinite() for term in terms)
        before = copy.deepcopy(model.state_dict())
        pixels = pinned.pixels.clone()
        pixels[0] = torch.nan
        train_step(model, [pinned._replace(pixels=pixels)], *given[2:], clip_norm=0.1, pending=pending)
        with pytest.raises(NonFiniteLoss, match="loss is nan"):
            train_step(*given, clip_norm=0.1, pending=pending)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_gradients_are_watched_once_they_are_complete(batch, small):
    start, norms = small(dropout=0.0), []
    for size in (5, 1):
        model = copy.deepcopy(start).train()
        optimizer = torch.optim.AdamW(model.parameters())

        def watch(model=model):
            norms.append(model.class_embed.weight.grad.norm().item())

        train_step(model, batch.split(size), Criterion(), optimizer, Accelerator(), watch=watch)
    assert len(norms) == 2 and norms[0] == pytest.approx(norms[1], rel=1e-5)
