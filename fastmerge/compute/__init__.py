"""Trees of merges on a back end: the CPU's threads, CUDA streams, or NumPy as their meaning."""

from typing import TYPE_CHECKING

from fastmerge.lazily import loading

if not TYPE_CHECKING:  # which would make every misspelt name one that is there
    __getattr__ = loading(__name__)
