"""Triton kernels: the GPU versions of the four primitives. Importing this imports neither torch nor
triton.

`fastmerge.kernels.gram`, `.combine`, `.select` and `.consensus` each hold a primitive under its own
name, with the arguments and the meaning of ``fastmerge/_C.pyi`` on torch tensors, and a batched
form (``gram_many`` ...) that does a whole model in one launch: every kernel works on a table of
segments, one per tensor, that lies on the device.
"""
