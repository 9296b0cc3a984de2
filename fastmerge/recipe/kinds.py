"""The kinds of files, by keys that no other has: what a command says of a file of another kind."""

from __future__ import annotations

_KEYS = {
    "recipe": ("merge_method", "models", "slices", "modules"),
    "mixture": ("experts", "gate_mode", "experts_per_token", "shared_experts"),
    "schedule": ("baseline", "pool", "schedule"),
    "search": ("space", "optimiser", "budget"),
}
_SAID = {
    "recipe": "this is a recipe; run `fastmerge merge`",
    "mixture": "this is a mixture of experts; run `fastmerge moe`",
    "schedule": "this is a schedule; run `fastmerge retrograde`",
    "search": "this is a search; run `fastmerge search`",
}


def keys_of_others(*own: str) -> dict[str, str]:
    """By key of every kind of file but ``own``: what is to be said of a file that has it."""
    return {key: _SAID[kind] for kind, keys in _KEYS.items() if kind not in own for key in keys}
