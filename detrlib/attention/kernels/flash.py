"""Entmax attention without the matrix of scores: for long rows of keys, such as the cells of an image.

Legend: B images, H heads, Q queries, K keys, D channels of queries and keys, V channels of values. The method is that
of `rows`, with scores recomputed from queries and keys, a tile at a time, whenever they are needed, as in Dao et al.
2022 ("FlashAttention"). Entmax gives back some of that work: tau only grows, so a tile that lies below it stays below
it. Each program keeps a list of flags, one per block of keys, and later passes, the mixing of values and the backward
pass included, skip the tiles that are not `live`.

Per query, the forward pass leaves three numbers behind, with which u = ((alpha - 1) x - top - tau)_+ gain gives the
weight p = u^c and its slope s = p^(2 - alpha) = u^(c-1): top = (alpha - 1) max x; tau; and gain. After Newton's last
step the sum of weights is not exactly one. To divide weights by it is to multiply u by gain = sum^(1 - alpha).

Dropout multiplies each weight, and in the backward pass its gradient g, by 0 or 1 / (1 - dropout). Which of the two is
not stored but computed again, from the position of the weight and a random number drawn once per call.

The forward kernel is here, the backward ones are in `flash_backward`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from detrlib.attention.kernels.flash_backward import backward_key_kernel, backward_query_kernel
from detrlib.attention.kernels.newton import (
    MOST_STEPS,
    check,
    describe,
    lower_power,
    newton_step,
    supported,
    tolerance,
)
from detrlib.attention.kernels.tiles import above_tau, drop, load_tile, some, store_tile, valid_keys

# Queries and keys per tile, by bytes per number. 64 x 64 scores over 4 warps are 32 registers per thread, and up to
# four such tiles are alive at a time. Float32 products are computed without tensor cores, from operands in registers,
# which leaves room for less.
BLOCKS = {2: 64, 4: 32}
WIDEST = 128  # channels of a head, beyond which registers no longer suffice


def attention_supported(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `sparse_attention` takes tensors like these."""
    same = query.dtype == key.dtype == value.dtype
    return same and supported(query) and max(query.shape[-1], value.shape[-1]) <= WIDEST


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: float | Tensor,
    padding: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """query [B,H,Q,D], key [B,H,K,D], value [B,H,K,V], padding bool [B,K] (True = padding) -> mixed [B,H,Q,V].

    alpha in (1, 2]: a number, or a tensor [H] that gets a gradient. An image of nothing but padding gives zeros.
    dropout: the share of weights set to zero, the others being divided by what is left, as `F.dropout` does. Which
    ones depends on PyTorch's generator for the CPU: on a GPU, to draw a number from its own would be to wait for it.
    """
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout {dropout} must lie between 0 and 1")
    check(query, key, value)
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(f"query, key and value differ in dtype: {query.dtype}, {key.dtype}, {value.dtype}")
    return _SparseAttention.apply(query, key, value, alpha, padding, dropout)


class _SparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, alpha, padding, dropout):
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        kind, alphas, stride = describe(alpha, query.device)
        mask = key if padding is None else padding.contiguous().view(torch.uint8)  # any pointer will do for none
        ctx.settings = _settings(query, value, kind, padding is not None, dropout > 0)
        images, heads, queries = query.shape[:3]
        block = ctx.settings["BLOCK_Q"]
        grid = (triton.cdiv(queries, block), images * heads)
        mixed = query.new_empty(*query.shape[:3], value.shape[3])
        state = torch.empty(3, images * heads, queries, dtype=torch.float32, device=query.device)  # top, tau, gain
        blocks = (images * heads, grid[0], triton.cdiv(key.shape[2], block))
        live = torch.empty(blocks, dtype=torch.int8, device=query.device)
        seed = torch.randint(2**63 - 1, (), device="cpu").item() if dropout else 0
        ctx.numbers = (heads, queries, key.shape[2], query.shape[3] ** -0.5, seed, float(dropout))
        ctx.stride = stride
        with torch.cuda.device_of(query):
            _forward_kernel[grid](
                query, key, value, mask, alphas, stride, mixed, state, live, *ctx.numbers, **ctx.settings
            )
        ctx.save_for_backward(query, key, value, mask, alphas, state, live)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        query, key, value, mask, alphas, state, live = ctx.saved_tensors
        gradient = gradient.contiguous()
        need_alpha = ctx.needs_input_grad[3]
        to_query, to_key, to_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        centre = torch.empty_like(state[0])
        to_alpha = torch.empty_like(state[0]) if need_alpha else centre
        inputs = (query, key, value, mask, alphas, ctx.stride, gradient, state, live, centre)
        programs = live.shape[0]
        with torch.cuda.device_of(query):
            backward_query_kernel[(live.shape[1], programs)](
                *inputs, to_query, to_alpha, *ctx.numbers, NEED_ALPHA=need_alpha, **ctx.settings
            )
            backward_key_kernel[(live.shape[2], programs)](*inputs, to_key, to_value, *ctx.numbers, **ctx.settings)
        to_alpha = to_alpha.view(query.shape[:3]).sum((0, 2)) if need_alpha else None
        return to_query, to_key, to_value, to_alpha, None, None


def _settings(query: Tensor, value: Tensor, kind: str, padded: bool, dropped: bool) -> dict:
    """What the kernels are compiled for."""
    channels, value_channels = query.shape[3], value.shape[3]
    return {
        "D": channels,
        "V": value_channels,
        "BLOCK_D": max(16, triton.next_power_of_2(channels)),  # tl.dot takes no less than 16
        "BLOCK_V": max(16, triton.next_power_of_2(value_channels)),
        "BLOCK_Q": BLOCKS[query.itemsize],
        "BLOCK_K": BLOCKS[query.itemsize],
        "KIND": kind,
        "PADDED": padded,
        "DROPOUT": dropped,
        # TF32, the default, would keep 10 bits of the scores: float32 attention has to agree with the unfused one.
        "PRECISION": "ieee",
        "num_warps": 4 if max(channels, value_channels) * query.itemsize <= 128 else 8,
        "num_stages": 2,
    }


@triton.jit(do_not_specialize=["seed"])
def _forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    alpha_ptr,
    alpha_stride,
    mixed_ptr,
    state_ptr,
    live_ptr,
    H,
    Q,
    K,
    scale,
    seed,
    dropout,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KIND: tl.constexpr,
    PADDED: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of queries of one head: the largest scores, the threshold, the mixed values."""
    head = tl.program_id(1).to(tl.int64)  # of all images: offsets from here on can pass 2^31
    heads = tl.num_programs(1)
    first = tl.program_id(0) * BLOCK_Q
    blocks = tl.cdiv(K, BLOCK_K)
    k_ptr += head * K * D
    v_ptr += head * K * V
    mask_ptr += head // H * K
    live_ptr += (head * tl.num_programs(0) + tl.program_id(0)) * blocks
    beyond = tl.load(alpha_ptr + head % H * alpha_stride) - 1
    rate = beyond * scale
    q = load_tile(q_ptr + head * Q * D, first, Q, D, BLOCK_Q, BLOCK_D)
    queries = first + tl.arange(0, BLOCK_Q)

    # Infinity for queries that do not exist: then no key has a weight there, and none keeps a tile alive.
    top = tl.where(queries < Q, float("-inf"), float("inf"))
    for block in range(blocks):
        k = load_tile(k_ptr, block * BLOCK_K, K, D, BLOCK_K, BLOCK_D)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        valid = valid_keys(mask_ptr, block * BLOCK_K, K, PADDED, BLOCK_K)
        here = tl.max(tl.where(valid[None, :], x, float("-inf")), 1)
        top = tl.maximum(top, here)
        # Weights vanish 1 / (alpha - 1) below the largest score, so below the largest so far as well. The margin is
        # for rounding. NaN counts as live: it should show, and -inf minus -inf is NaN, too.
        tl.store(live_ptr + block, some(~((here - top) * rate < -1.001)))
    top = tl.where(top == float("-inf"), 0.0, top * rate)

    tau = tl.full([BLOCK_Q], -1.0, tl.float32)
    largest = 1.0
    steps = 0
    while (largest > 0) & (steps < MOST_STEPS):
        tl.debug_barrier()  # flags are stored by one thread and loaded by all
        total = tl.zeros([BLOCK_Q], tl.float32)
        slope = tl.zeros([BLOCK_Q], tl.float32)
        for block in range(blocks):
            if tl.load(live_ptr + block) != 0:
                k = load_tile(k_ptr, block * BLOCK_K, K, D, BLOCK_K, BLOCK_D)
                x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                valid = valid_keys(mask_ptr, block * BLOCK_K, K, PADDED, BLOCK_K)
                above = above_tau(x, valid[None, :], rate, top[:, None], tau[:, None])
                lower = lower_power(above, beyond, KIND)
                total += tl.sum(lower * above, 1)
                slope += tl.sum(lower, 1)
                tl.store(live_ptr + block, some(~(above <= 0)))
        step = newton_step(total, slope, beyond, KIND)
        tau += step
        largest = tl.max(step) - tolerance(beyond, KIND)
        steps += 1

    tl.debug_barrier()
    total = tl.zeros([BLOCK_Q], tl.float32)
    mixed = tl.zeros([BLOCK_Q, BLOCK_V], tl.float32)
    for block in range(blocks):
        if tl.load(live_ptr + block) != 0:
            k = load_tile(k_ptr, block * BLOCK_K, K, D, BLOCK_K, BLOCK_D)
            x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            valid = valid_keys(mask_ptr, block * BLOCK_K, K, PADDED, BLOCK_K)
            above = above_tau(x, valid[None, :], rate, top[:, None], tau[:, None])
            weights = lower_power(above, beyond, KIND) * above
            total += tl.sum(weights, 1)
            keys = block * BLOCK_K + tl.arange(0, BLOCK_K)
            weights = drop(weights, seed, dropout, head, queries[:, None], keys[None, :], DROPOUT)
            v = load_tile(v_ptr, block * BLOCK_K, K, V, BLOCK_K, BLOCK_V)
            mixed = tl.dot(weights.to(v.dtype), v, mixed, input_precision=PRECISION)
            tl.store(live_ptr + block, some(~(above <= 0)))
    total = tl.where(total == 0, 1.0, total)
    store_tile(mixed_ptr + head * Q * V, mixed / total[:, None], first, Q, V, BLOCK_Q, BLOCK_V)
    state_ptr += head * Q + queries
    tl.store(state_ptr, top, mask=queries < Q)
    tl.store(state_ptr + heads.to(tl.int64) * Q, tau, mask=queries < Q)
    tl.store(state_ptr + 2 * heads.to(tl.int64) * Q, tl.exp2(-beyond * tl.log2(total)), mask=queries < Q)
