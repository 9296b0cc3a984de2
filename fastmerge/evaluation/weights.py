"""What a scorer is handed: one state's weights, in the form that it asks for."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from fastmerge import api, live
from fastmerge.engine.merge import merge_plan
from fastmerge.output.disk import remove_tree
from fastmerge.output.working import check_ours
from fastmerge.planning.plan import Plan

SCORED = ".scored"  # in a run's folder, while a scorer reads the model in it


@runtime_checkable
class Weights(Protocol):
    """The weights to score. Each form is made when it is asked for, and the scorer's until it
    returns.
    """

    def torch(self) -> Any:
        """The transformers model, in evaluation mode: the same object at each call, of which only
        the weights change.
        """

    def folder(self) -> Path:
        """A model folder that transformers loads, tokenizer included; removed afterwards."""

    def state_dict(self) -> Mapping[str, Any]:
        """Torch tensors on the CPU by the folder's names, in the folder's types; a copy."""


class Merged:
    """The weights of a plan. A context: at its end the folder is gone."""

    def __init__(
        self,
        plan: Plan,
        load: Callable[[Plan], Any],
        *,
        near: Path | None = None,
        threads: int | None = None,
    ) -> None:
        """``load`` merges the plan into the model and returns it. ``near``: the folder that a model
        folder is made in; None is the system's for temporary files.
        """
        self._plan, self._load, self._threads = plan, load, threads
        self._near = near
        self._root: Path | None = None

    def torch(self) -> Any:
        """See `Weights`."""
        return self._load(self._plan)

    def folder(self) -> Path:
        """See `Weights`; raises FastmergeError where the disk has no room for it."""
        if self._root is None:
            near = self._near
            root = Path(tempfile.mkdtemp()) if near is None else near / SCORED
            if near is not None:
                near.mkdir(parents=True, exist_ok=True)
                root.mkdir()
            self._root = root
            files = api.model_files(self._plan, "model")
            out = self._root / "model"
            merge_plan(self._plan, out, threads=self._threads, side_files=files)
        return self._root / "model"

    def state_dict(self) -> Mapping[str, Any]:
        """See `Weights`."""
        made = live.tensors(self._plan, threads=self._threads)
        return {item.name: tensor for item, tensor in made}

    def __enter__(self) -> Merged:
        if self._near is not None:
            clear(self._near / SCORED)
        return self

    def __exit__(self, *error: object) -> None:
        root, self._root = self._root, None
        if root is not None:
            remove_tree(root)


def clear(scratch: Path) -> None:
    """Removes what a run that was killed had left at ``scratch``. Raises OutputError where that is
    no folder of ours.
    """
    if os.path.lexists(scratch):
        check_ours(scratch, os.lstat(scratch), folder=True)
        remove_tree(scratch)


def model_of(weights: Any) -> Any:
    """The transformers model to score; a model in place of `Weights` is taken as it is."""
    return weights.torch() if isinstance(weights, Weights) else weights
