"""The models of a plan, each opened once, as its documents see them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from pathlib import Path

from fastmerge.errors import FastmergeError, ModelError, RecipeError, UnsupportedError, nearest
from fastmerge.models import hub
from fastmerge.models.adapter import Adapter, is_adapter
from fastmerge.models.architecture import COMPUTED
from fastmerge.models.checkpoint import open_model
from fastmerge.models.model import Model, same_bytes, same_numbers
from fastmerge.models.names import is_of_optimizer
from fastmerge.models.side_files import check_card, side_files
from fastmerge.models.vocabulary import Vocabulary, read_vocabulary
from fastmerge.planning.adapted import adapted
from fastmerge.planning.inputs import TensorPlan, View
from fastmerge.tree.nodes import Stored


class Opened:
    """The models by reference, numbered in the order of their first use."""

    def __init__(
        self,
        given: Mapping[str, Model],
        base_folder: Path | None,
        resolve: Callable[[str], Path],
    ) -> None:
        """``given``: models that are there already, by reference. Others are looked for in
        ``base_folder`` and then by ``resolve``.
        """
        self.models: list[Model] = []
        self.references: list[str] = []
        self.views: list[View] = []  # parallel to models; of an adapter, its first base's
        self.notes: list[str] = []
        self._given, self._base_folder, self._resolve = given, base_folder, resolve
        self._by_reference: dict[str, View] = {}
        self._by_identity: dict[Hashable, View] = {}
        self._adapters: dict[Path, int] = {}  # their numbers among the models

    def view(self, reference: str, where: str) -> View:
        """The model called ``reference``; FastmergeError that begins with ``where``."""
        if reference not in self._by_reference:
            self._by_reference[reference] = self._open(reference, where)
        return self._by_reference[reference]

    def tokenizer(self, reference: str, where: str) -> View | Vocabulary:
        """The model called ``reference`` where it is open already, else no more of it than its
        tokenizer.
        """
        known = reference in self._given or reference in self._by_reference
        if known or self._split(reference, where) is not None:
            return self.view(reference, where)
        path = self._find(reference, where)
        if path.resolve() in self._by_identity:
            return self.view(reference, where)
        found = read_vocabulary(reference, side_files(path), path)
        if found is None:
            raise ModelError(f"{where}: '{reference}' has no tokenizer files; name one that has")
        return found

    def _open(self, reference: str, where: str) -> View:
        if reference in self._given:
            model = self._given[reference]
            return self._numbered(id(model), reference, lambda: model)
        pair = self._split(reference, where)
        if pair is not None:
            return self._adapted(reference, *pair, where)
        if hub.is_remote(reference):
            from fastmerge.models.remote import Remote

            return self._numbered(reference.rstrip("/"), reference, lambda: Remote(reference))
        path = self._find(reference, where)
        if is_adapter(path):
            raise UnsupportedError(
                f"{where}: '{reference}' is a LoRA adapter, not a model; write it behind the model "
                f"that it is for: 'model: BASE+{reference}'"
            )
        return self._numbered(path.resolve(), reference, lambda: open_model(path))

    def _split(self, reference: str, where: str) -> tuple[str, str] | None:
        """The model and the adapter that ``model+adapter`` names; None for a model alone."""
        if "+" not in reference or self._is_here(reference):
            return None
        signs = [at for at, letter in enumerate(reference) if letter == "+"]
        pairs = [(reference[:at].strip(), reference[at + 1 :].strip()) for at in signs]
        if len(pairs) > 1:  # in a folder's name too, then
            pairs = [(a, b) for a, b in pairs if self._is_here(a) and self._is_here(b)]
        if len(pairs) != 1 or not all(pairs[0]):
            raise RecipeError(
                f"{where}: '{reference}': must be one model, '+' and one adapter; to put on "
                "several, merge models that have one each"
            )
        return pairs[0]

    def _is_here(self, reference: str) -> bool:
        return bool(reference) and any(
            hub.local(place) is not None for place in (self._beside(reference), reference)
        )

    def _beside(self, reference: str) -> str:
        """Where it would lie in the recipe's own folder; '' where there is none."""
        return "" if self._base_folder is None else str(self._base_folder / reference)

    def _adapted(self, reference: str, base: str, adapter: str, where: str) -> View:
        view = self.view(base, where)
        path = self._find(adapter, where)
        identity = (id(view), path.resolve())
        if identity in self._by_identity:
            return self._by_identity[identity]
        try:
            number = self._adapters.get(path.resolve())
            if number is None:
                number = self._adapters[path.resolve()] = len(self.models)
                self.models.append(Adapter.open(path))
                check_card(path)
                self.references.append(adapter)
                self.views.append(view)
            opened = self.models[number]
            assert isinstance(opened, Adapter)
            found = adapted(view, opened, number, reference, self.notes.append)
        except FastmergeError as error:
            raise type(error)(f"{where}: {error}") from None
        self._by_identity[identity] = found
        return found

    def _find(self, reference: str, where: str) -> Path:
        try:
            local = hub.local(self._beside(reference))
            if local is not None:
                return local
            name, _, revision = reference.partition("@")
            if revision and hub.local(reference) is None:
                found = hub.local(self._beside(name)) or hub.local(name)
                if found is not None:
                    self.notes.append(
                        f"'{name}' is a folder here, which has no revisions: '@{revision}' has no "
                        "effect"
                    )
                    return found
            missing = hub.local(reference) is None and hub.is_path(reference)
            if missing and self._base_folder is not None:
                raise hub.no_such_path(reference, self._base_folder, Path())
            return self._resolve(reference)
        except FastmergeError as error:
            given = f"; of models=: {nearest(reference, self._given)}" if self._given else ""
            raise type(error)(f"{where}: {error}{given}") from None

    def _numbered(self, identity: Hashable, reference: str, make: Callable[[], Model]) -> View:
        if identity in self._by_identity:
            return self._by_identity[identity]
        model = make()
        if model.folder is not None:
            check_card(model.folder)
        index = len(self.models)
        self.models.append(model)
        self.references.append(reference)
        others = {name for name in model.tensors if is_of_optimizer(name)}
        tensors = {
            name: TensorPlan(
                name, info.shape, info.dtype, Stored(index, name, info.shape, info.dtype)
            )
            for name, info in model.tensors.items()
            if not name.endswith(COMPUTED) and name not in others
        }
        if others:
            self.notes.append(
                f"'{reference}': {len(others)} tensors are an optimizer's by their names, and are "
                "left out"
            )
        if len(tensors) + len(others) < len(model.tensors):
            self.notes.append(f"{COMPUTED[1:]} is not written: transformers computes it")
        view = View(reference, dict(model.config), tensors, model)
        self.views.append(view)
        self._by_identity[identity] = view
        return view

    def same(self, a: TensorPlan, b: TensorPlan) -> bool:
        """Whether two stored tensors have the same bytes, or the same numbers where they are stored
        as different floats; False for computed ones.
        """
        if a.shape != b.shape or not (isinstance(a.root, Stored) and isinstance(b.root, Stored)):
            return False
        x, y = self.models[a.root.model], self.models[b.root.model]
        if a.root.dtype == b.root.dtype:
            return same_bytes(x, a.root.name, y, b.root.name)
        floats = a.root.dtype.mergeable and b.root.dtype.mergeable
        return floats and same_numbers(x, a.root.name, y, b.root.name)
