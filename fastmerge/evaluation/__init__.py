"""Scores of a model: what is asked, who scores it, what is kept, how sure one may be."""

from typing import TYPE_CHECKING

from fastmerge.lazily import loading

if not TYPE_CHECKING:  # which would make every misspelt name one that is there
    __getattr__ = loading(__name__)
