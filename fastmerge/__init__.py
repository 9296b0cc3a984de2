"""fastmerge: merge the weights of language models at the speed of memory.

``merge`` runs a recipe from safetensors to safetensors, ``materialise`` into memory, ``plan`` only
decides it; ``average`` averages checkpoints; ``verify`` says what of a written folder has changed;
``ops`` merges tensors in memory; ``adapters`` has LoRAs; ``llama`` loads results through
transformers; ``retrograde`` runs schedules; ``live`` has what is kept for live models. Submodules
load when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastmerge.version import __version__

if TYPE_CHECKING:
    from fastmerge import adapters, api, live, llama, ops, retrograde
    from fastmerge.adapters import extract_lora, merge_adapters
    from fastmerge.api import finish, fold, materialise, merge, plan, verify
    from fastmerge.averages import average
    from fastmerge.engine.join import FinishReport
    from fastmerge.engine.report import MergeReport
    from fastmerge.engine.verify import Verification
    from fastmerge.errors import (
        FastmergeError,
        ModelError,
        OutputError,
        RecipeError,
        ResourceError,
        UnsupportedError,
    )
    from fastmerge.methods import method
    from fastmerge.state_dicts import merge_state_dicts

__all__ = [
    "FastmergeError",
    "FinishReport",
    "MergeReport",
    "ModelError",
    "OutputError",
    "RecipeError",
    "ResourceError",
    "UnsupportedError",
    "Verification",
    "__version__",
    "adapters",
    "api",
    "average",
    "extract_lora",
    "finish",
    "fold",
    "live",
    "llama",
    "materialise",
    "merge",
    "merge_adapters",
    "merge_state_dicts",
    "method",
    "ops",
    "plan",
    "retrograde",
    "verify",
]

_HOMES = {
    "average": "fastmerge.averages",
    "extract_lora": "fastmerge.adapters",
    "finish": "fastmerge.api",
    "fold": "fastmerge.api",
    "merge_adapters": "fastmerge.adapters",
    "materialise": "fastmerge.api",
    "merge": "fastmerge.api",
    "plan": "fastmerge.api",
    "merge_state_dicts": "fastmerge.state_dicts",
    "verify": "fastmerge.api",
    "FinishReport": "fastmerge.engine.join",
    "MergeReport": "fastmerge.engine.report",
    "Verification": "fastmerge.engine.verify",
    "method": "fastmerge.methods",
    **{name: "fastmerge.errors" for name in __all__ if name.endswith("Error")},
}
_MODULES = ("adapters", "api", "live", "llama", "ops", "retrograde")


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _MODULES:
        return import_module(f"fastmerge.{name}")
    raise AttributeError(f"module 'fastmerge' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
