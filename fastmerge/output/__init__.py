"""A model folder that is either absent or whole, and what lies in it beside the weights."""

from typing import TYPE_CHECKING

from fastmerge.lazily import loading

if not TYPE_CHECKING:  # which would make every misspelt name one that is there
    __getattr__ = loading(__name__)
