"""fastmerge: merge the weights of language models at the speed of memory.

``merge`` runs a recipe from safetensors to safetensors, ``materialise`` into memory, ``plan`` only
decides it; ``average`` averages checkpoints; ``verify`` says what of a written folder has changed;
``ops`` merges tensors in memory; ``adapters`` has LoRAs; ``llama`` loads results through
transformers; ``retrograde`` runs schedules; ``live`` has what is kept for live models. Submodules
load when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastmerge.lazily import loading
from fastmerge.version import __version__

if TYPE_CHECKING:
    from fastmerge import (
        adapters,
        api,
        averages,
        evaluation,
        integrations,
        live,
        llama,
        methods,
        ops,
        retrograde,
        search,
        state_dicts,
    )
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
    "averages",
    "evaluation",
    "extract_lora",
    "finish",
    "fold",
    "integrations",
    "live",
    "llama",
    "materialise",
    "merge",
    "merge_adapters",
    "merge_state_dicts",
    "method",
    "methods",
    "ops",
    "plan",
    "retrograde",
    "search",
    "state_dicts",
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

if not TYPE_CHECKING:  # which would make every misspelt name one that is there
    __getattr__ = loading(__name__, _HOMES)


def __dir__() -> list[str]:
    return __all__
