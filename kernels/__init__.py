"""Triton kernels: the GPU versions of the four primitives, and of what methods need besides.
Importing this imports neither torch nor triton.

`fastmerge.kernels.gram`, `.combine`, `.select` and `.consensus` each hold a primitive under its own
name, with the arguments and the meaning of ``fastmerge/_C.pyi``, and a batched form (``gram_many``
...) that does a whole model in one launch: every kernel works on a table of segments, one per
tensor, that lies on the device. Inputs are contiguous torch tensors of one device, up to 16 of any
mix of float32, float16, bfloat16, float8_e4m3fn and float8_e5m2; outputs are float32, float16 or
bfloat16 and may be one of the inputs. Anything else raises UnsupportedError or FastmergeError.
"""
