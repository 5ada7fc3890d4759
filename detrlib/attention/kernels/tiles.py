"""Tiles of attention: what the kernels of `flash` load, store and compute of a block of queries and a block of keys.

Legend: Q queries, K keys; `head` counts the heads of all images.
"""

import triton
import triton.language as tl


@triton.jit
def load_tile(pointer, first, count, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] of a matrix [count, WIDTH], from row `first` on; zeros beyond its edges."""
    rows = first + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    return tl.load(pointer + rows * WIDTH + columns, mask=(rows < count) & (columns < WIDTH), other=0.0)


@triton.jit
def store_tile(pointer, tile, first, count, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Write [ROWS, COLUMNS] to where `load_tile` reads them, but for what lies beyond the edges."""
    rows = first + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    inside = (rows < count) & (columns < WIDTH)
    tl.store(pointer + rows * WIDTH + columns, tile.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def valid_keys(mask_ptr, first, K, PADDED: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_K] bool: which keys exist and are not padding."""
    keys = first + tl.arange(0, BLOCK_K)
    valid = keys < K
    if PADDED:
        valid = valid & (tl.load(mask_ptr + keys, mask=valid, other=1) == 0)
    return valid


@triton.jit
def load_state(state_ptr, head, heads, first, Q, BLOCK_Q: tl.constexpr):
    """top, tau and gain of a block of queries, [BLOCK_Q] each; beyond the last query, such that all weights are 0."""
    queries = first + tl.arange(0, BLOCK_Q)
    state_ptr += head * Q + queries
    top = tl.load(state_ptr, mask=queries < Q, other=float("inf"))
    tau = tl.load(state_ptr + heads * Q, mask=queries < Q, other=0.0)
    gain = tl.load(state_ptr + 2 * heads * Q, mask=queries < Q, other=1.0)
    return top, tau, gain


@triton.jit
def above_tau(x, valid, rate, top, tau):
    """u = (rate x - top - tau)_+ and 0 for keys that are not valid; NaN stays NaN."""
    u = x * rate - top - tau
    return tl.where(valid & ~(u < 0), u, 0.0)


@triton.jit
def some(flags):
    """Whether any of them is set. They are compared first: the largest of NaN and a number is the number on a GPU."""
    return tl.max(flags.to(tl.int32)).to(tl.int8)


@triton.jit
def drop(x, seed, dropout, head, queries, keys, DROPOUT: tl.constexpr):
    """Multiply a tile by what dropout makes of each weight: 0 or 1 / (1 - dropout).

    A weight's position, not that in the tile, is the counter of the generator: all kernels find the same, no two
    weights share a number, and nothing can overflow.
    """
    if not DROPOUT:
        return x
    number, _, _, _ = tl.philox(seed, keys, queries, head.to(tl.int32), 0)
    scale = 1 / tl.maximum(1 - dropout, 1e-9)  # a dropout of 1 leaves none to scale
    return x * tl.where(tl.uint_to_uniform_float(number) < dropout, 0.0, scale)
