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

    def load(self, plan: Plan, observe: live.OnTensor | None = None) -> Any:
        """Merges ``plan`` into the model and returns it; ``observe`` sees every tensor. Raises
        FastmergeError where the model cannot be built or does not fit the plan.
        """
        if self._model is None:
            import torch

            if self._threads is not None:
                # Torch takes all cores; where others work, each of its passes waits for them.
                torch.set_num_threads(self._threads)
            dtype = getattr(torch, self._settings.dtype)
            with quiet():
                # From the plan and not from a folder: its config may untie the head.
                model = llama.load_merged(plan, threads=self._threads, observe=observe, dtype=dtype)
                self._model = model.to(self._settings.device).requires_grad_(False)
        else:
            live.merge_into(self._model, plan, threads=self._threads, observe=observe)
        return self._model
