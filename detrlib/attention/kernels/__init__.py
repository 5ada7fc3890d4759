"""Triton kernels: rows, the whole of attention at once (flash), and deformable sampling."""
