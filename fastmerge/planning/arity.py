"""How many models a method takes."""

from __future__ import annotations

from fastmerge.errors import RecipeError
from fastmerge.methods import Method


def check_arity(method: Method, count: int, place: str) -> None:
    """Raises RecipeError for a number of models that ``method`` does not take."""
    low, high = method.min_operands, method.max_operands
    if count >= low and (high is None or count <= high):
        return
    wanted = (
        f"exactly {low}" if low == high else f"at least {low}" if count < low else f"at most {high}"
    )
    noun = "model" if wanted.endswith(" 1") else "models"
    besides = " besides the base" if method.base in ("required", "optional") else ""
    raise RecipeError(f"{place}: {method.name} takes {wanted} {noun}{besides}, not {count}")


def is_the_base(method: Method, count: int) -> bool:
    """Whether the result of ``count`` models besides the base is the base, as in mergekit: where
    none has a delta. Recipes fold a LoRA that way: it is the base's, and no model stands beside it.
    """
    several = method.max_operands is None and method.min_operands == 1
    return method.base == "required" and several and count == 0
