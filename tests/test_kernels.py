"""Triton kernels against the plain PyTorch they replace, computed in float64.

On a machine with a GPU they run on it; elsewhere Triton's interpreter runs them, one operation at a time in NumPy, on
tiny tensors. That they compile for a GPU is tested without one, in a process of its own that runs this file.
"""

import importlib
import os
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # NumPy, about NaN
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def import_kernels():
    """`kernels` and `flash`, for the interpreter if there is no GPU.

    Triton decides at each decorator whether a function is compiled, and torchvision has long imported the functions of
    its own library. The environment is left as it was: other tests and their processes do not want the interpreter.
    """
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu" and __name__ != "__main__":
            patch.setenv("TRITON_INTERPRET", "1")
            from triton.language import standard

            for name, function in vars(importlib.reload(standard)).items():
                if hasattr(triton.language, name):
                    setattr(triton.language, name, function)
        return importlib.import_module("detrlib.attention.kernels"), importlib.import_module("detrlib.attention.flash")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """What `import_kernels` has chosen, for as long as a test lasts."""
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


kernels, flash = import_kernels()

from detrlib import attention  # noqa: E402
from detrlib.attention import multihead, solvers  # noqa: E402
from detrlib.attention.solvers import entmax  # noqa: E402

ALPHAS = [2.0, 1.5, 1.3, 1.05, "learned"]
every_alpha = pytest.mark.parametrize("alpha", ALPHAS)


def random(*shape: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(DEVICE)


def spread(alpha: float | str, count: int) -> float | torch.Tensor:
    """The number itself, or as many alphas as there are rows or heads."""
    return torch.linspace(1.02, 1.98, count, device=DEVICE) if alpha == "learned" else alpha


def grows(*tensors):
    """Copies in float64 that collect gradients; what is no tensor stays as it is."""
    return [x.double().requires_grad_() if isinstance(x, torch.Tensor) else x for x in tensors]


def gradients(value, weighting, inputs):
    return torch.autograd.grad(
        (value * weighting).sum(), [x for x in inputs if isinstance(x, torch.Tensor)], retain_graph=True
    )


def close(found: torch.Tensor, expected: torch.Tensor, atol: float = 1e-6, rtol: float = 0.0) -> None:
    torch.testing.assert_close(found.double(), expected.double(), atol=atol, rtol=rtol)


# Rows


def check_rows(x: torch.Tensor, alpha: float | torch.Tensor) -> torch.Tensor:
    """Compare weights and gradients with those of `solvers`; give back the weights."""
    learned = isinstance(alpha, torch.Tensor)
    inputs = grows(x, alpha)
    expected = entmax(inputs[0], inputs[1][:, None] if learned else alpha)
    weighting = random(*x.shape, seed=1)
    wanted = gradients(expected, weighting.double(), inputs)
    weights = kernels.entmax_rows(x, alpha)
    to_scores, to_alpha = kernels.entmax_rows_backward(weights, weighting, alpha, need_alpha=learned)
    assert weights.dtype == to_scores.dtype == torch.float32
    close(weights, expected)
    close(to_scores, wanted[0])
    if learned:
        close(to_alpha, wanted[1], atol=1e-4, rtol=1e-4)
    else:
        assert to_alpha is None
    return weights


@every_alpha
@pytest.mark.parametrize("shape", [(9, 1), (11, 7), (3, 64), (5, 300)])
def test_rows_are_those_of_the_solver(alpha, shape):
    check_rows(random(*shape, scale=2), spread(alpha, shape[0]))


@every_alpha
def test_rows_longer_than_a_block(alpha, monkeypatch):
    monkeypatch.setattr(kernels, "LONGEST", 64)
    monkeypatch.setattr(kernels, "BLOCK", 32)
    x = random(3, 110, scale=2)
    x[0, 35:] = x[1, :96] = float("-inf")
    check_rows(x, spread(alpha, 3))


@pytest.mark.skipif(DEVICE == "cpu", reason="sizes for a GPU")
@every_alpha
@pytest.mark.parametrize("length", [950, 15000, 16384, 20000])
def test_rows_at_their_real_size(alpha, length):
    check_rows(random(70, length, scale=2), spread(alpha, 70))


@every_alpha
def test_masked_keys_get_nothing(alpha):
    x, alpha = random(4, 20, scale=2), spread(alpha, 4)
    x[0, 3:9] = x[1, 0] = x[2, 1:] = float("-inf")
    weights = check_rows(x, alpha)
    assert (weights[x.isinf()] == 0).all()


@every_alpha
@pytest.mark.parametrize("longest", [64, 16])
def test_a_row_without_keys_is_zero_and_has_no_gradient(alpha, longest, monkeypatch):
    monkeypatch.setattr(kernels, "LONGEST", longest)
    monkeypatch.setattr(kernels, "BLOCK", 16)
    x, alpha = random(3, 20), spread(alpha, 3)
    x[1] = float("-inf")
    weights = kernels.entmax_rows(x, alpha)
    to_scores, to_alpha = kernels.entmax_rows_backward(weights, random(3, 20, seed=1), alpha, need_alpha=True)
    close(weights.sum(1), torch.tensor([1.0, 0.0, 1.0], device=DEVICE))
    assert (weights[1] == 0).all()
    assert (to_scores[1] == 0).all()
    assert to_alpha[1] == 0
    assert to_scores[[0, 2]].abs().amax(1).min() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_half_precision_are_computed_in_float32(dtype):
    x = random(4, 50, scale=2).to(dtype)
    weights = kernels.entmax_rows(x, 1.3)
    assert weights.dtype == torch.float32
    close(weights, entmax(x.double(), 1.3))
    rounded = kernels.entmax_rows(x, 1.3, dtype)
    assert rounded.dtype == dtype
    close(rounded, weights, atol=4e-3)


@pytest.mark.parametrize("scale", [1e-6, 1e4])
@pytest.mark.parametrize("alpha", [2.0, 1.5, 1.01])
def test_rows_sum_to_one_at_every_scale(scale, alpha):
    weights = kernels.entmax_rows(random(4, 700, scale=scale), alpha)
    assert (weights >= 0).all()
    close(weights.sum(1), torch.ones(4, device=DEVICE), atol=1e-5)


@pytest.mark.parametrize("longest", [64, 16])
def test_a_score_that_is_no_number_shows(longest, monkeypatch):
    monkeypatch.setattr(kernels, "LONGEST", longest)
    monkeypatch.setattr(kernels, "BLOCK", 16)
    x = random(3, 20)
    x[1, 4] = float("nan")
    weights = kernels.entmax_rows(x, 1.5)
    assert weights[1].isnan().all()
    assert weights[[0, 2]].isfinite().all()


def test_rows_that_are_not_contiguous_and_no_rows_at_all():
    x = random(20, 6, scale=2).T
    torch.testing.assert_close(kernels.entmax_rows(x, 1.5), kernels.entmax_rows(x.contiguous(), 1.5))
    assert kernels.entmax_rows(random(0, 5), 1.5).shape == (0, 5)
    assert kernels.entmax_rows_backward(random(0, 5), random(0, 5), 1.5)[0].shape == (0, 5)


# Fused attention


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """The smallest tiles, so that small inputs have many."""
    monkeypatch.setattr(flash, "BLOCKS", {2: 16, 4: 16})


def explicit(query, key, value, alpha, padding=None):
    """[B,H,Q,V] by way of all weights; an image of nothing but padding gives zeros."""
    scores = (query * query.shape[-1] ** -0.5) @ key.mT
    mask = torch.zeros_like(scores, dtype=torch.bool) if padding is None else padding[:, None, None].expand_as(scores)
    hidden = mask & ~mask.all(-1, keepdim=True)
    alpha = alpha[:, None, None] if isinstance(alpha, torch.Tensor) else alpha
    return entmax(scores.masked_fill(hidden, float("-inf")), alpha).masked_fill(mask, 0.0) @ value


def check_attention(query, key, value, alpha, padding=None, atol: float = 1e-5) -> torch.Tensor:
    """Compare the mixed values and all gradients with the explicit computation; give back the mixed values."""
    inputs, exact = [query, key, value, alpha], grows(query, key, value, alpha)
    expected = explicit(*exact, padding)
    weighting = random(*expected.shape, seed=9).to(query.dtype)
    wanted = gradients(expected, weighting.double(), exact)
    inputs = [x.requires_grad_() if isinstance(x, torch.Tensor) else x for x in inputs]
    mixed = flash.sparse_attention(*inputs, padding)
    found = gradients(mixed, weighting, inputs)
    assert mixed.dtype == query.dtype
    close(mixed, expected, atol)
    for x, y in zip(found[:3], wanted[:3], strict=True):
        close(x, y, 3 * atol)
    if isinstance(alpha, torch.Tensor):
        close(found[3], wanted[3], atol=10 * atol, rtol=max(1e-4, atol))
    return mixed


def some_padding(images: int, keys: int) -> torch.Tensor:
    """[B,K]: a hole wider than a block in the first image, the end of the last."""
    padding = torch.zeros(images, keys, dtype=torch.bool, device=DEVICE)
    padding[0, 3:38] = True
    padding[-1, -5:] = True
    return padding


@every_alpha
@pytest.mark.parametrize("padded", [False, True])
def test_fused_attention_is_the_explicit_one(alpha, padded):
    query, key, value = random(2, 2, 19, 16, scale=2), random(2, 2, 45, 16, seed=1), random(2, 2, 45, 24, seed=2)
    check_attention(query, key, value, spread(alpha, 2), some_padding(2, 45) if padded else None)


@pytest.mark.parametrize("sizes", [(1, 1, 8, 8), (16, 16, 32, 16), (17, 33, 5, 40)])
def test_fused_attention_of_odd_sizes(sizes):
    queries, keys, channels, value_channels = sizes
    query, key = random(1, 3, queries, channels, scale=2), random(1, 3, keys, channels, seed=1)
    check_attention(query, key, random(1, 3, keys, value_channels, seed=2), spread("learned", 3))


def test_fused_attention_of_heads_that_are_views():
    query, key, value = (random(2, n, 2, 8, seed=n).transpose(1, 2) for n in (18, 20, 20))
    check_attention(query, key, value, 1.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16])
@pytest.mark.parametrize("alpha", [1.5, "learned"])
def test_fused_attention_in_half_precision(dtype, alpha):
    """The interpreter has no product of bfloat16."""
    query, key, value = (random(1, 2, n, 16, seed=n).to(dtype) for n in (18, 35, 35))
    check_attention(query, key, value, spread(alpha, 2), some_padding(1, 35), atol=2e-2)


@pytest.mark.parametrize("alpha", [2.0, 1.5, "learned"])
def test_fused_attention_of_nothing_but_padding_is_zero(alpha):
    query, key, value = random(2, 2, 5, 16), random(2, 2, 20, 16, seed=1), random(2, 2, 20, 16, seed=2)
    padding = torch.zeros(2, 20, dtype=torch.bool, device=DEVICE)
    padding[0] = True
    mixed = check_attention(query, key, value, spread(alpha, 2), padding)
    assert (mixed[0] == 0).all()
    assert all((x.grad is None) or (x.grad[0] == 0).all() for x in (query, key, value))


@pytest.mark.parametrize("alpha", [2.0, 1.5, "learned"])
def test_tiles_without_weight_are_skipped(alpha):
    """Each block of queries looks at one block of keys: the values of all others are never touched."""
    blocks = torch.arange(64, device=DEVICE) // 16
    places = torch.nn.functional.one_hot(blocks, 16).float()[None, None]  # [1,1,64,16]
    query, key, value = 12 * places, 12 * places + random(1, 1, 64, 16, scale=0.05), random(1, 1, 64, 16, seed=2)
    alpha = torch.tensor([1.4], device=DEVICE) if alpha == "learned" else alpha
    mixed = check_attention(query, key, value, alpha, atol=1e-4)  # scores of 36 have but so many digits
    live = mixed.grad_fn.saved_tensors[-1]
    assert torch.equal(live[0].bool(), torch.eye(4, dtype=torch.bool, device=DEVICE))

    spoilt = value.detach().clone()
    spoilt[:, :, 32:] = float("nan")  # would spread to every query as 0 * NaN
    query.grad = None
    again = flash.sparse_attention(query, key, spoilt, alpha)
    torch.testing.assert_close(again[:, :, :32], mixed[:, :, :32])
    assert torch.autograd.grad(again[:, :, :32].sum(), query)[0][:, :, :32].isfinite().all()


def test_tiles_die_during_the_search_for_the_threshold():
    """Blocks well above the first threshold, which is 1 / (alpha - 1) below the largest score, but below the last."""
    key = torch.zeros(1, 1, 48, 16, device=DEVICE)
    key[..., 0] = torch.tensor([0.0, -0.5, -0.9], device=DEVICE).repeat_interleave(16)
    query = torch.zeros(1, 1, 3, 16, device=DEVICE)
    query[..., 0] = 4.0  # scores are then those numbers
    mixed = check_attention(query, key, random(1, 1, 48, 16), 2.0)
    assert mixed.grad_fn.saved_tensors[-1].flatten().tolist() == [1, 0, 0]


def test_a_query_that_is_no_number_shows():
    query, key, value = (random(1, 1, n, 16, seed=n) for n in (20, 40, 40))
    query[0, 0, 3, 2] = float("nan")
    mixed = flash.sparse_attention(query, key, value, 1.5)
    assert mixed[0, 0, 3].isnan().all()
    assert mixed[0, 0, [2, 4, 19]].isfinite().all()


@pytest.mark.skipif(DEVICE == "cpu", reason="sizes for a GPU")
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("channels", [32, 64, 128])
@pytest.mark.parametrize("alpha", [2.0, 1.5, "learned"])
def test_fused_attention_at_its_real_size(dtype, atol, channels, alpha, monkeypatch):
    monkeypatch.setattr(flash, "BLOCKS", {2: 64, 4: 32})
    query, key = (random(2, 4, n, channels, seed=n).to(dtype) for n in (700, 900))
    check_attention(query, key, random(2, 4, 900, 32).to(dtype), spread(alpha, 4), some_padding(2, 900), atol)


# What is taken, and what is not


@pytest.mark.parametrize("name", ["sparsemax", "entmax15", "alpha_entmax"])
def test_transforms_and_layers_go_through_the_kernels_where_they_apply(name, monkeypatch):
    """The same layer three times: as it is, with the row kernels, with the fused one."""
    torch.manual_seed(0)
    layer = attention.MultiheadAttention(32, 2, attention.build_transform(name, 2)).to(DEVICE)
    query, key = random(2, 5, 32), random(2, 9, 32, seed=1)
    padding = torch.arange(9, device=DEVICE) >= torch.tensor([[9], [6]], device=DEVICE)
    used = []

    def run():
        output, _ = layer(query, key, key, padding)
        return [output, *torch.autograd.grad(output.square().sum(), list(layer.parameters()))]

    def spy(module, function):
        real = getattr(module, function)
        monkeypatch.setattr(module, function, lambda *inputs: (used.append(function), real(*inputs))[1])

    monkeypatch.setattr(solvers, "_kernels", lambda scores: None)
    plain = run()
    for function in ("entmax_rows", "entmax_rows_backward"):
        spy(kernels, function)
    monkeypatch.setattr(solvers, "_kernels", lambda scores: kernels)
    rows = run()
    assert used == ["entmax_rows", "entmax_rows_backward"]
    spy(flash, "sparse_attention")
    monkeypatch.setattr(multihead, "FUSED_KEYS", 9)
    monkeypatch.setattr(multihead, "_flash", lambda: flash)
    monkeypatch.setattr(multihead, "_fused", lambda *inputs: True)
    fused = run()
    assert used[2:] == ["sparse_attention"]
    for expected, *found in zip(plain, rows, fused, strict=True):
        for one in found:
            close(one, expected, atol=1e-4, rtol=1e-3)


def test_nothing_is_supported_without_a_gpu():
    assert not kernels.supported(torch.zeros(2, 3))
    assert not flash.attention_supported(*torch.zeros(3, 1, 1, 2, 8))


def test_double_precision_is_refused():
    x = random(2, 3).double()
    with pytest.raises(TypeError, match="float64"):
        kernels.entmax_rows(x, 1.5)
    with pytest.raises(TypeError, match="float64"):
        flash.sparse_attention(x[None, None], x[None, None], x[None, None], 1.5)


def test_mixed_precision_is_refused():
    x = random(1, 1, 2, 8)
    with pytest.raises(TypeError, match="differ"):
        flash.sparse_attention(x, x.bfloat16(), x, 1.5)


# Compilation


def compile_for_hopper() -> None:
    """Compile every kernel, in its richest form, down to machine code for an H100 or H200."""
    numbers = {"alpha_stride", "H", "Q", "R", "K"}
    halves = {f"{name}_ptr" for name in ("q", "k", "v", "mixed", "gradient", "to_q", "to_k", "to_v")}
    kinds = dict.fromkeys(numbers, "i32") | {"scale": "fp32", "tolerance": "fp32", "mask_ptr": "*u8"}
    kinds |= {"live_ptr": "*i8"} | dict.fromkeys(halves, "*bf16")
    tile = flash._settings(*torch.empty(2, 1, 1, 1, 32, dtype=torch.bfloat16), "general", padded=True)
    options = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
    row = {"KIND": "general", "ROWS": 1, "BLOCK": 1024}
    work = [
        (kernels._held_kernel, row),
        (kernels._streamed_kernel, row),
        (kernels._backward_kernel, row | {"NEED_ALPHA": True}),
        (flash._forward_kernel, tile),
        (flash._backward_query_kernel, tile | {"NEED_ALPHA": True}),
        (flash._backward_key_kernel, tile),
    ]
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    for kernel, constants in work:
        signature = {name: "constexpr" if name in constants else kinds.get(name, "*fp32") for name in kernel.arg_names}
        source = triton.compiler.ASTSource(kernel, signature, constants)
        assert triton.compile(source, target=target, options=options).asm["cubin"]


@pytest.mark.skipif("nvidia" not in triton.backends.backends, reason="this Triton has no NVIDIA backend")
def test_every_kernel_compiles_for_a_gpu(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


if __name__ == "__main__":
    compile_for_hopper()
