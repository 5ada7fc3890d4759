"""Exact entmax of many rows at once, with gradients for scores and alpha: who computes it where.

on a CPU, in float32            native, loops in C, if the machine has a C compiler
on a CPU otherwise              newton.solve
on a GPU                        kernels/rows.py
where these kernels cannot be   newton.in_fixed_steps, which never waits for the device
in an exported graph            the same, as operations that every runtime has
in a compiled graph             one operator, `detrlib::entmax`: any of the first four, unseen by the compiler
"""

import functools
import importlib.util

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from detrlib.attention import native
from detrlib.attention.newton import differentiate, in_fixed_steps, solve

LEAST_ALPHA = 1 + 1e-6  # nearer to 1, float32 cannot tell it from 1
KERNEL_ALPHA = 1.01  # below it, the kernels' errors of about 1e-7 / (alpha - 1) would show


def entmax(scores: Tensor, alpha: float | Tensor) -> Tensor:
    """Weights over the last axis (Peters et al. 2019, Eq. 10): [..., K] -> [..., K], rows sum to one.

    alpha from 1 + 1e-6 to 2: a number, or a tensor that broadcasts to [..., 1] and then gets a gradient (Correia et al.
    2019, Prop. 1). Scores of -inf get weight zero; a row of nothing else is not allowed. Raises ValueError for an alpha
    out of range, for which a GPU is waited for where it holds alpha: a layer whose alpha cannot leave the range calls
    `entmax_unchecked`.
    """
    if isinstance(alpha, Tensor):
        wrong = alpha[~((alpha >= LEAST_ALPHA) & (alpha <= 2))].tolist()  # not a number is among them
    else:
        wrong = [] if LEAST_ALPHA <= alpha <= 2 else [alpha]
    if wrong:
        raise ValueError(f"alpha {wrong[0]:g} must lie between 1 + 1e-6 and 2; 1 itself is a softmax")
    return entmax_unchecked(scores, alpha)


def entmax_unchecked(scores: Tensor, alpha: float | Tensor) -> Tensor:
    """`entmax` of an alpha that is known to be in its range."""
    if not scores.numel():
        return scores.softmax(-1)
    if isinstance(alpha, Tensor):
        # At 2 itself keys without weight would count, since 0 ** 0 is 1. The bound must not stop the gradient.
        below_two = alpha + (alpha.clamp(max=2 - 1e-6) - alpha).detach()
        alphas, alpha = below_two.to(scores.dtype).expand(*scores.shape[:-1], 1), 0.0
    else:
        alphas, alpha = None, float(alpha)
    if torch.compiler.is_exporting():
        return in_fixed_steps(scores, alpha if alphas is None else alphas)
    # The operator costs 40 us more than the function.
    return (_entmax if torch.compiler.is_compiling() else _Entmax.apply)(scores, alphas, alpha)


class _Entmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores: Tensor, alphas: Tensor | None, alpha: float) -> Tensor:
        weights = _weights(scores, alphas, alpha)
        ctx.save_for_backward(weights, alphas)
        ctx.alpha = alpha
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        weights, alphas = ctx.saved_tensors
        return *_gradients(weights, gradient, alphas, ctx.alpha, ctx.needs_input_grad[1]), None


def _weights(scores: Tensor, alphas: Tensor | None, alpha: float) -> Tensor:
    x = scores.reshape(-1, scores.shape[-1]).contiguous()
    rows = alpha if alphas is None else alphas.reshape(-1, 1)
    if (kernels := _kernels(scores, alphas, alpha)) is not None:
        weights = kernels.entmax_rows(x, rows if alphas is None else rows.view(-1))
    else:
        weights = (solve if x.is_cpu else in_fixed_steps)(x, rows)
    return weights.view(scores.shape)


def _gradients(
    weights: Tensor, gradient: Tensor, alphas: Tensor | None, alpha: float, need_alpha: bool
) -> tuple[Tensor, Tensor | None]:
    """Of scores and alphas, from weights and their gradient."""
    p, g = (t.reshape(-1, t.shape[-1]).contiguous() for t in (weights, gradient))
    rows = alpha if alphas is None else alphas.reshape(-1, 1)
    if (kernels := _kernels(weights, alphas, alpha)) is not None:
        to_scores, to_alpha = kernels.entmax_rows_backward(p, g, rows if alphas is None else rows.view(-1), need_alpha)
    else:
        to_scores, to_alpha = differentiate(p, g, rows, need_alpha)
    return to_scores.view(weights.shape), to_alpha.view(alphas.shape) if need_alpha else None


@torch.library.custom_op("detrlib::entmax", mutates_args=())
def _entmax(scores: Tensor, alphas: Tensor | None, alpha: float) -> Tensor:
    return _weights(scores, alphas, alpha)


@torch.library.custom_op("detrlib::entmax_gradients", mutates_args=())
def _entmax_gradients(
    weights: Tensor, gradient: Tensor, alphas: Tensor | None, alpha: float, need_alpha: bool
) -> tuple[Tensor, Tensor]:
    to_scores, to_alpha = _gradients(weights, gradient, alphas, alpha, need_alpha)
    return to_scores, weights.new_empty(0) if to_alpha is None else to_alpha


@_entmax.register_fake
def _(scores: Tensor, alphas: Tensor | None, alpha: float) -> Tensor:
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


@_entmax_gradients.register_fake
def _(weights: Tensor, gradient: Tensor, alphas: Tensor | None, alpha: float, need_alpha: bool):
    return torch.empty_like(weights), weights.new_empty(alphas.shape if need_alpha else 0)


def _remember(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(output, inputs[1])
    ctx.alpha = inputs[2]


def _backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
    weights, alphas = ctx.saved_tensors
    need_alpha = ctx.needs_input_grad[1]
    to_scores, to_alphas = _entmax_gradients(weights, gradient, alphas, ctx.alpha, need_alpha)
    return to_scores, to_alphas if need_alpha else None, None


_entmax.register_autograd(_backward, setup_context=_remember)


def _kernels(scores: Tensor, alphas: Tensor | None, alpha: float):
    """Compiled loops, or the Triton kernels, where they take such scores and alphas; else None."""
    if native.supported(scores, alpha if alphas is None else alphas):
        return native
    if not (scores.is_cuda and has_triton()) or (alphas is None and alpha < KERNEL_ALPHA):
        return None
    from detrlib.attention.kernels import rows as kernels

    return kernels if kernels.supported(scores) else None


@functools.cache
def has_triton() -> bool:
    """Whether kernels can be compiled here; not every build of PyTorch brings Triton."""
    return importlib.util.find_spec("triton") is not None
