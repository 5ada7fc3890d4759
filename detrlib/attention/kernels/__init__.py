"""Kernels: what `attention` computes, without sending every intermediate number to memory and back.

Those of Triton take over by themselves, on a GPU with bfloat16 (Ampere or newer) on which Triton is installed, from
values of at most float32; on a CPU, in single precision, the loops of `rows.c` and `patches.c` (TVMax), where a C
compiler can build them (attention/native.py). Everywhere else plain PyTorch computes the same.

    rows            entmax of rows of scores: always, for alpha of 1.01 or more (`KERNEL_ALPHA` in attention/entmax.py)
    flash           scores, entmax and mixing at once: if no maps are asked for, from 2048 keys on (`FUSED_KEYS` in
                    attention/mixing.py), for heads of at most 128 channels
    deformable      sampling and mixing of deformable attention: always
    newton, tiles   what rows and flash share
    flash_backward  the gradients of flash

Every module here imports triton, which not every machine has: import them only after asking
`importlib.util.find_spec("triton")`.
"""
