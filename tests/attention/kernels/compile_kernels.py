"""Compile the Triton kernels, which takes no GPU: a program of its own, since `test_kernels` interprets them."""

import torch
import triton

from detrlib.attention.kernels import flash, flash_backward
from detrlib.attention.kernels import rows as kernels


def compile_for_hopper() -> None:
    """Compile every kernel, in its richest form, down to machine code for an H100 or H200."""
    numbers = {"alpha_stride", "H", "Q", "R", "K"}
    halves = {f"{name}_ptr" for name in ("q", "k", "v", "mixed", "gradient", "to_q", "to_k", "to_v")}
    kinds = dict.fromkeys(numbers, "i32") | {"scale": "fp32", "seed": "i64", "dropout": "fp32", "mask_ptr": "*u8"}
    kinds |= {"live_ptr": "*i8"} | dict.fromkeys(halves, "*bf16")
    tile = flash._settings(*torch.empty(2, 1, 1, 1, 32, dtype=torch.bfloat16), "general", padded=True, dropped=True)
    options = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
    row = {"KIND": "general", "ROWS": 1, "BLOCK": 1024}
    work = [
        (kernels._held_kernel, row),
        (kernels._streamed_kernel, row),
        (kernels._backward_kernel, row | {"NEED_ALPHA": True}),
        (flash._forward_kernel, tile),
        (flash_backward.backward_query_kernel, tile | {"NEED_ALPHA": True}),
        (flash_backward.backward_key_kernel, tile),
    ]
    for kernel, constants in work:
        assert compiled(kernel, constants, kinds, 90, options).asm["cubin"]
    # The widest heads fit into what the multiprocessor of a consumer's card shares, of which they need most here.
    wide = flash._settings(*torch.empty(2, 1, 1, 1, 128, dtype=torch.bfloat16), "sparsemax", padded=True, dropped=False)
    options = {name: wide.pop(name) for name in ("num_warps", "num_stages")}
    assert compiled(flash_backward.backward_key_kernel, wide, kinds, 86, options).metadata.shared <= 99 * 1024
    # Products of float32 are not rounded to TF32, as they would be by default.
    exact = flash._settings(*torch.empty(2, 1, 1, 1, 32), "sparsemax", padded=False, dropped=False)
    options = {name: exact.pop(name) for name in ("num_warps", "num_stages")}
    kinds |= dict.fromkeys(halves, "*fp32")
    assert "tf32" not in compiled(flash._forward_kernel, exact, kinds, 90, options).asm["ptx"]


def compiled(kernel, constants: dict, kinds: dict[str, str], capability: int, options: dict):
    """A kernel for a GPU of such a compute capability; kinds: of arguments that are no pointers to float32."""
    signature = {name: "constexpr" if name in constants else kinds.get(name, "*fp32") for name in kernel.arg_names}
    source = triton.compiler.ASTSource(kernel, signature, constants)
    return triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", capability, 32), options=options)


if __name__ == "__main__":
    compile_for_hopper()
