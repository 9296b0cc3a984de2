"""Models: what is on disk, checked before a weight is read."""

from typing import TYPE_CHECKING

from fastmerge.lazily import loading

if not TYPE_CHECKING:  # which would make every misspelt name one that is there
    __getattr__ = loading(__name__)
