"""Triton kernels of deformable attention against plain PyTorch and against the definition.

On a machine with a GPU they run on it; elsewhere Triton's interpreter runs them on tiny tensors. That they compile for
a GPU is tested without one, in a process of its own that runs this file.
"""

import math
import os
import subprocess
import sys

import pytest
import torch

from detrlib.attention.deformable import sample_and_mix

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(4, 5), (2, 3), (1, 1)]  # of the samples that fixtures make
TOKENS = sum(h * w for h, w in SHAPES)


@pytest.fixture
def kernels(kernel_modules):
    return kernel_modules["deformable"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("channels", "points", "tile"), [(8, 2, 64), (5, 1, 512), (3, 3, 16)])
def test_kernels_are_what_they_replace(kernels, dtype, channels, points, tile, monkeypatch, draw, make_samples):
    """Several programs, some of them not full, and channels that are no power of two."""
    monkeypatch.setattr(kernels, "TILE", tile)
    values = draw(2, TOKENS, 3, channels).to(dtype).to(DEVICE).requires_grad_()
    samples = [x.to(DEVICE).requires_grad_() for x in make_samples(queries=3, points=points, dtype=torch.float32)]
    exact = [x.detach().double().cpu().requires_grad_() for x in (values, *samples)]
    found, expected = kernels.sample_and_mix(values, SHAPES, *samples), sample_and_mix(exact[0], SHAPES, *exact[1:])
    assert found.dtype == dtype
    rounding = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double().cpu(), expected, atol=rounding, rtol=rounding)
    weighting = draw(*found.shape, seed=3).to(dtype)
    mine = torch.autograd.grad((found * weighting.to(DEVICE)).sum(), (values, *samples))
    theirs = torch.autograd.grad((expected * weighting.double()).sum(), exact)
    assert [x.dtype for x in mine] == [dtype, torch.float32, torch.float32]
    torch.testing.assert_close(mine[0].double().cpu(), theirs[0], atol=rounding, rtol=rounding)
    for x, y in zip(mine[1:], theirs[1:], strict=True):
        torch.testing.assert_close(x.double().cpu(), y, atol=2e-5, rtol=1e-5)


def test_kernels_agree_with_the_definition(kernels, by_loops, draw, make_samples):
    values, samples = draw(1, TOKENS, 2, 4), make_samples(images=1, queries=2, heads=2)
    arguments = [x.float().to(DEVICE) for x in (values, *samples)]
    found = kernels.sample_and_mix(arguments[0], SHAPES, *arguments[1:])
    torch.testing.assert_close(found.double().cpu(), by_loops(values, SHAPES, *samples), atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # NumPy, about NaN
def test_kernels_at_places_that_are_far_or_no_numbers(kernels, draw, make_samples):
    values = draw(1, TOKENS, 3, 4, dtype=torch.float32).to(DEVICE).requires_grad_()
    locations, weights = (x.to(DEVICE) for x in make_samples(images=1, queries=3, dtype=torch.float32))
    for query, distance in enumerate((1.0, 1e30, math.inf)):
        along = locations[0, query, ..., query % 2]  # the other axis may be inside
        along.copy_((0.5 + 3 * along.sign()) * distance)
    mixed = kernels.sample_and_mix(values, SHAPES, locations.requires_grad_(), weights)
    gradients = torch.autograd.grad(mixed.sum(), (values, locations))
    assert all((x == 0).all() for x in (mixed, *gradients))
    locations = locations.detach().clone()
    locations[0, 1, 2, 0, 0, 1] = math.nan
    mixed = kernels.sample_and_mix(values, SHAPES, locations, weights).unflatten(2, (3, 4))
    assert mixed[0, 1, 2].isnan().all()
    assert mixed.isnan().sum() == 4


def test_kernels_without_queries_and_without_need_of_values(kernels, draw, make_samples):
    values = draw(2, TOKENS, 3, 4, dtype=torch.float32).to(DEVICE)
    empty = [x.to(DEVICE).requires_grad_() for x in make_samples(queries=0, dtype=torch.float32)]
    mixed = kernels.sample_and_mix(values.requires_grad_(), SHAPES, *empty)
    assert mixed.shape == (2, 0, 12)
    assert (torch.autograd.grad(mixed.sum(), values)[0] == 0).all()
    samples = [x.to(DEVICE).requires_grad_() for x in make_samples(dtype=torch.float32)]
    wanted = torch.autograd.grad(kernels.sample_and_mix(values, SHAPES, *samples).square().sum(), samples)
    found = torch.autograd.grad(kernels.sample_and_mix(values.detach(), SHAPES, *samples).square().sum(), samples)
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y)


def test_double_precision_is_for_plain_pytorch(kernels, draw, make_samples):
    values = draw(2, TOKENS, 3, 4).to(DEVICE)
    assert not kernels.supported(values)
    with pytest.raises(TypeError, match="float64"):
        kernels.sample_and_mix(values, SHAPES, *(x.to(DEVICE) for x in make_samples()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_at_their_real_size(kernels, dtype, draw):
    """Four levels of an image of 800 x 1066, many queries to a value. No location is near the border of a cell."""
    shapes = [(100, 134), (50, 67), (25, 34), (13, 17)]
    extent = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float64)[:, None]
    where = extent * (0.5 + 0.3 * draw(2, 300, 8, 4, 4, 2, seed=1))
    locations = (where.floor() + 0.5 + where.frac().abs().clamp(0.05, 0.95)) / extent
    weights = draw(2, 300, 8, 16, seed=2).softmax(-1).view(2, 300, 8, 4, 4)
    values = draw(2, sum(h * w for h, w in shapes), 8, 32).to(dtype)
    inputs = [x.to(DEVICE).requires_grad_() for x in (values, locations.float(), weights.float())]
    exact = [x.detach().double().cpu().requires_grad_() for x in inputs]
    found, expected = (
        kernels.sample_and_mix(inputs[0], shapes, *inputs[1:]),
        sample_and_mix(exact[0], shapes, *exact[1:]),
    )
    weighting = draw(*found.shape, seed=3).to(dtype)
    mine = found, *torch.autograd.grad((found * weighting.to(DEVICE)).sum(), inputs)
    theirs = expected, *torch.autograd.grad((expected * weighting.double()).sum(), exact)
    for x, y in zip(mine, theirs, strict=True):
        error = (x.double().cpu() - y).abs().max() / y.abs().max().clamp(min=1)
        assert error < max(5e-5, 4 * torch.finfo(x.dtype).eps)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_module_uses_kernels_on_a_gpu(dtype, make_batch, make_module):
    module, (query, references, tokens, padding) = make_module(), make_batch(4)
    expected = module(query, references, tokens, SHAPES, padding)[0]
    moved = (x.to(DEVICE) for x in (query, references, tokens))
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        found = module.to(DEVICE)(*moved, SHAPES, padding.to(DEVICE))[0]
    torch.testing.assert_close(found.float().cpu(), expected, atol=1e-3 if dtype == torch.float32 else 0.05, rtol=0)


def compile_for_hopper() -> None:
    """Compile both kernels, forward and backward, down to PTX for an H100 or H200."""
    import triton

    from detrlib.attention.kernels import deformable as module

    values = torch.empty(2, 9, 8, 32, dtype=torch.bfloat16)
    constants = module._launch(values, torch.empty(2, 3, 8, 4, 4, 2))[2]
    types = dict.fromkeys(("N", "Q", "S"), "i32") | {"levels_ptr": "*i64"}
    types |= dict.fromkeys(("values_ptr", "mixed_ptr", "gradient_ptr"), "*bf16")
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    for kernel, more in ((module._forward_kernel, {}), (module._backward_kernel, {"NEED_VALUES": True})):
        fixed = constants | more
        signature = {name: "constexpr" if name in fixed else types.get(name, "*fp32") for name in kernel.arg_names}
        compiled = triton.compile(triton.compiler.ASTSource(kernel, signature, fixed), target=target)
        assert ".target sm_90" in compiled.asm["ptx"]
        assert ("red." in compiled.asm["ptx"] or "atom." in compiled.asm["ptx"]) == bool(more)


def test_kernels_compile_for_a_gpu(tmp_path):
    triton = pytest.importorskip("triton")
    if "nvidia" not in triton.backends.backends:
        pytest.skip("this Triton has no NVIDIA backend")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


if __name__ == "__main__":
    compile_for_hopper()
