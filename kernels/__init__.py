"""Triton kernels: the GPU versions of the four primitives. Importing this imports neither torch nor triton."""
