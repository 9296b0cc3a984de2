"""Triton kernels: the primitives on the GPU. Importing it imports neither torch nor triton."""
