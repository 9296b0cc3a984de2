"""One transformers model whose weights change in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fastmerge import live, llama
from fastmerge.engine.in_memory import materialise_plan
from fastmerge.errors import ModelError
from fastmerge.evaluation.harness import quiet
from fastmerge.evaluation.settings import Evaluate
from fastmerge.plan.inputs import TensorPlan
from fastmerge.plan.plan import Plan

Observer = Callable[[TensorPlan, "np.ndarray[Any, Any]"], None]


class Loaded:
    """One transformers model whose weights change in place: what a written folder would hold."""

    def __init__(self, settings: Evaluate, threads: int | None = None) -> None:
        self._settings = settings
        self._threads = threads
        self._model: Any = None

    def load(self, plan: Plan, observe: Observer | None = None) -> Any:
        """Materialises ``plan`` into the model and returns it; ``observe`` sees every tensor."""
        import torch

        if self._model is None:
            dtype = getattr(torch, self._settings.dtype)
            with quiet():
                # From the plan and not from a folder: its config may untie the head.
                model = llama.load_merged(plan, threads=self._threads, dtype=dtype)
                self._model = model.to(self._settings.device).requires_grad_(False)
            if observe is None:
                return self._model
        if observe is None:
            live.merge_into(self._model, plan, threads=self._threads)
            return self._model
        parameters = self._model.state_dict()
        with torch.no_grad():
            for item, array in materialise_plan(plan, threads=self._threads):
                observe(item, array)
                target = parameters.get(item.name)
                if target is None:
                    raise ModelError(f"the model has no parameter '{item.name}'")
                if item.dtype.mergeable:  # integers stay
                    raw = torch.from_numpy(array.reshape(-1).view(np.uint8))
                    target.copy_(raw.view(getattr(torch, item.dtype.name)).reshape(item.shape))
        return self._model
