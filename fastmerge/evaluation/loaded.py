"""One transformers model whose weights change in place."""

from __future__ import annotations

from typing import Any

from fastmerge import live, llama
from fastmerge.evaluation.harness import quiet
from fastmerge.evaluation.settings import Evaluate
from fastmerge.planning.plan import Plan


class Loaded:
    """One transformers model whose weights change in place: what a written folder would hold."""

    def __init__(self, settings: Evaluate, threads: int | None = None) -> None:
        self._settings = settings
        self._threads = threads
        self._model: Any = None
        self._form: dict[str, Any] = {}  # of the model as it was built

    def load(self, plan: Plan, observe: live.OnTensor | None = None) -> Any:
        """Merges ``plan`` into the model and returns it; ``observe`` sees every tensor. Raises
        FastmergeError where the model cannot be built or does not fit the plan.
        """
        if self._model is None or _form(self._model) != self._form:
            # What scored the last state may have halved the model, or taken layers out of it.
            self._model = None
            import torch

            if self._threads is not None:
                # Torch takes all cores; where others work, each of its passes waits for them.
                torch.set_num_threads(self._threads)
            dtype = getattr(torch, self._settings.dtype)
            with quiet():
                # From the plan and not from a folder: its config may untie the head.
                model = llama.load_merged(plan, threads=self._threads, observe=observe, dtype=dtype)
                self._model = model.to(self._settings.device).requires_grad_(False)
            self._form = _form(self._model)
        else:
            live.merge_into(self._model, plan, threads=self._threads, observe=observe)
        return self._model


def _form(model: Any) -> dict[str, Any]:
    """All of a model but its numbers."""
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: (tensor.shape, tensor.dtype, tensor.device) for name, tensor in named}
