"""The backward kernels of entmax attention without the matrix of scores; method and legend are those of `flash`.

One kernel goes through the keys for a block of queries, the other through the queries for a block of keys; both compute
again, from what the forward pass left behind, the weights of the tiles that are live.
"""

import triton
import triton.language as tl

from detrlib.attention.kernels.newton import bend, lower_power
from detrlib.attention.kernels.tiles import above_tau, drop, load_state, load_tile, store_tile, valid_keys


@triton.jit(do_not_specialize=["seed"])
def backward_query_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    alpha_ptr,
    alpha_stride,
    gradient_ptr,
    state_ptr,
    live_ptr,
    centre_ptr,
    to_q_ptr,
    to_alpha_ptr,
    H,
    Q,
    K,
    scale,
    seed,
    dropout,
    NEED_ALPHA: tl.constexpr,
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
    """One block of queries: centre = sum s g / sum s, gradients of queries s (g - centre) k, and of alpha.

    g is the gradient of the weights, that of the mixed values times the values.
    """
    head = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK_Q
    blocks = tl.cdiv(K, BLOCK_K)
    k_ptr += head * K * D
    v_ptr += head * K * V
    mask_ptr += head // H * K
    live_ptr += (head * tl.num_programs(0) + tl.program_id(0)) * blocks
    beyond = tl.load(alpha_ptr + head % H * alpha_stride) - 1
    rate = beyond * scale
    q = load_tile(q_ptr + head * Q * D, first, Q, D, BLOCK_Q, BLOCK_D)
    gradient = load_tile(gradient_ptr + head * Q * V, first, Q, V, BLOCK_Q, BLOCK_V)
    top, tau, gain = load_state(state_ptr, head, heads, first, Q, BLOCK_Q)
    queries = first + tl.arange(0, BLOCK_Q)

    pull = tl.zeros([BLOCK_Q], tl.float32)
    slope = tl.zeros([BLOCK_Q], tl.float32)
    for block in range(blocks):
        if tl.load(live_ptr + block) != 0:
            k = load_tile(k_ptr, block * BLOCK_K, K, D, BLOCK_K, BLOCK_D)
            v = load_tile(v_ptr, block * BLOCK_K, K, V, BLOCK_K, BLOCK_V)
            x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            g = tl.dot(gradient, tl.trans(v), input_precision=PRECISION)
            keys = block * BLOCK_K + tl.arange(0, BLOCK_K)
            g = drop(g, seed, dropout, head, queries[:, None], keys[None, :], DROPOUT)
            valid = valid_keys(mask_ptr, block * BLOCK_K, K, PADDED, BLOCK_K)
            above = above_tau(x, valid[None, :], rate, top[:, None], tau[:, None]) * gain[:, None]
            s = lower_power(above, beyond, KIND)
            pull += tl.sum(s * g, 1)
            slope += tl.sum(s, 1)
    centre = pull / tl.where(slope == 0, 1.0, slope)
    tl.store(centre_ptr + head * Q + queries, centre, mask=queries < Q)

    to_q = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    tilt = tl.zeros([BLOCK_Q], tl.float32)
    for block in range(blocks):
        if tl.load(live_ptr + block) != 0:
            k = load_tile(k_ptr, block * BLOCK_K, K, D, BLOCK_K, BLOCK_D)
            v = load_tile(v_ptr, block * BLOCK_K, K, V, BLOCK_K, BLOCK_V)
            x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            g = tl.dot(gradient, tl.trans(v), input_precision=PRECISION)
            keys = block * BLOCK_K + tl.arange(0, BLOCK_K)
            g = drop(g, seed, dropout, head, queries[:, None], keys[None, :], DROPOUT)
            valid = valid_keys(mask_ptr, block * BLOCK_K, K, PADDED, BLOCK_K)
            above = above_tau(x, valid[None, :], rate, top[:, None], tau[:, None]) * gain[:, None]
            s = lower_power(above, beyond, KIND)
            s *= g - centre[:, None]
            to_q = tl.dot(s.to(k.dtype), k, to_q, input_precision=PRECISION)
            if NEED_ALPHA:
                tilt += tl.sum(s * bend(above), 1)
    store_tile(to_q_ptr + head * Q * D, to_q * scale, first, Q, D, BLOCK_Q, BLOCK_D)
    if NEED_ALPHA:
        tl.store(to_alpha_ptr + head * Q + queries, tilt / (beyond * beyond), mask=queries < Q)


@triton.jit(do_not_specialize=["seed"])
def backward_key_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    alpha_ptr,
    alpha_stride,
    gradient_ptr,
    state_ptr,
    live_ptr,
    centre_ptr,
    to_k_ptr,
    to_v_ptr,
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
    """One block of keys: gradients of keys s (g - centre) q, and of values p times that of the mixed values.

    Tiles are transposed, keys first, so that both products take them as they are.
    """
    head = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK_K
    blocks = tl.cdiv(Q, BLOCK_Q)
    q_ptr += head * Q * D
    gradient_ptr += head * Q * V
    live_ptr += head * blocks * tl.num_programs(0) + tl.program_id(0)
    beyond = tl.load(alpha_ptr + head % H * alpha_stride) - 1
    rate = beyond * scale
    k = load_tile(k_ptr + head * K * D, first, K, D, BLOCK_K, BLOCK_D)
    v = load_tile(v_ptr + head * K * V, first, K, V, BLOCK_K, BLOCK_V)
    valid = valid_keys(mask_ptr + head // H * K, first, K, PADDED, BLOCK_K)
    keys = first + tl.arange(0, BLOCK_K)

    to_k = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    to_v = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    for block in range(blocks):
        if tl.load(live_ptr + block * tl.num_programs(0)) != 0:
            q = load_tile(q_ptr, block * BLOCK_Q, Q, D, BLOCK_Q, BLOCK_D)
            gradient = load_tile(gradient_ptr, block * BLOCK_Q, Q, V, BLOCK_Q, BLOCK_V)
            top, tau, gain = load_state(state_ptr, head, heads, block * BLOCK_Q, Q, BLOCK_Q)
            queries = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
            centre = tl.load(centre_ptr + head * Q + queries, mask=queries < Q, other=0.0)
            x = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            above = above_tau(x, valid[:, None], rate, top[None, :], tau[None, :]) * gain[None, :]
            s = lower_power(above, beyond, KIND)
            weights = drop(s * above, seed, dropout, head, queries[None, :], keys[:, None], DROPOUT)
            to_v = tl.dot(weights.to(v.dtype), gradient, to_v, input_precision=PRECISION)
            g = tl.dot(v, tl.trans(gradient), input_precision=PRECISION)
            g = drop(g, seed, dropout, head, queries[None, :], keys[:, None], DROPOUT) - centre[None, :]
            to_k = tl.dot((s * g).to(q.dtype), q, to_k, input_precision=PRECISION)
    store_tile(to_k_ptr + head * K * D, to_k * scale, first, K, D, BLOCK_K, BLOCK_D)
    store_tile(to_v_ptr + head * K * V, to_v, first, K, V, BLOCK_K, BLOCK_V)
