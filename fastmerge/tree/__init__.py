"""The tree that makes one output tensor, and the algebra that makes it one combination."""

from typing import TYPE_CHECKING

from fastmerge.lazily import loading

if not TYPE_CHECKING:  # which would make every misspelt name one that is there
    __getattr__ = loading(__name__)
