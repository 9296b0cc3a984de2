"""A model with a LoRA adapter on it, as a merge sees it: each adapted weight is one leaf that is
computed where it is read (tree.nodes.LowRank).

It computes what PEFT's model of base and adapter does. Where the base ties its head to its
embeddings and the adapter is for one of the two, that is no longer one tensor: the result has a
head of its own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from fastmerge.dtypes import F32
from fastmerge.errors import FastmergeError, ModelError, UnsupportedError, and_others
from fastmerge.models.adapter import Adapter, Factors
from fastmerge.models.architecture import ends, layer_of
from fastmerge.models.config import CAUSAL, classes_of, is_tied, model_type, text_config
from fastmerge.models.header import show
from fastmerge.models.links import hub_repository
from fastmerge.models.names import moved_part, prefix_hint, renamed
from fastmerge.models.patterns import starts
from fastmerge.models.quantised import find_quantised
from fastmerge.models.side_files import is_tokenizer, side_files
from fastmerge.models.vocabulary import TEMPLATE, Vocabulary, identity, read_vocabulary, template_of
from fastmerge.once import cached_property
from fastmerge.planning.config import set_tokens
from fastmerge.planning.experts import IN_OUT, Module, Place, stacked
from fastmerge.planning.inputs import Note, TensorPlan, View
from fastmerge.planning.precision import as_numbers
from fastmerge.tree.collapse import weighted_sum
from fastmerge.tree.nodes import Leaf, LowRank, RowMap, Rows, Stack, Stored

_MAX_PREFIXES = 4  # beginnings that a wrapper gives its parts; llava has three
_HEAD = "lm_head.weight"


def adapted(base: View, adapter: Adapter, number: int, label: str, note: Note) -> View:
    """The view of ``base`` with ``adapter`` on it. number: the adapter's, among the plan's models.

    Raises FastmergeError, which does not say where, if the adapter is not for this base.
    """
    return _Adapted(base, adapter, number, label, note).view()


class _Adapted:
    def __init__(self, base: View, adapter: Adapter, number: int, label: str, note: Note) -> None:
        base = as_numbers(base, note)
        self.base, self.adapter, self.number = base, adapter, number
        self.label, self.note = label, note
        self.tensors = dict(base.tensors)
        self.factors, self.saved = adapter.factors, adapter.saved
        if self._is_tied and self._keeps_tie:
            self._leave_out_head()
        found = find_quantised(base.config, base.tensors, base.donor.folder)
        if found is not None and found.packed is not None:
            raise UnsupportedError(
                f"'{base.label}' is quantised (tensor '{found.packed}'), and an adapter is added "
                "to numbers; fold it into the original weights"
            )

    def view(self) -> View:
        if self.adapter.remark:
            self.note(self.adapter.remark)
        self._note_base()
        names = self._names()
        self._check_whole(names)
        self._check_saved(names)
        for wanted, stored in self.saved.items():
            self._replace(names[wanted], stored)
        for module, factors in self.factors.items():
            if factors.matrices is not None:
                self._add_to_parameter(names[factors.target], factors)
                continue
            self._add(names[factors.target], factors)
            if factors.bias is not None:
                self._add_bias(names[f"{module}.bias"], factors.bias, factors.scale)
        for module, tokens in self.adapter.tokens.items():
            self._replace_rows(names[_weight(module)], tokens.rows, tokens.indices)
        tensors = self._with_head()
        view = replace(self.base, label=self.label, tensors=tensors)
        return replace(view, vocabulary=self._vocabulary(view), config=self._config(view))

    def _note_base(self) -> None:
        """Says where the adapter's config names a base that this one is not called by: shapes fit,
        and no more is known. A folder here and a name on the Hub are often one model.
        """
        named = self.adapter.base_name
        if named is not None and not self._is_named:
            self.note(
                f"'{self.adapter.path}' names {show(named)} as its base, and is put on "
                f"'{self.base.label}': names and shapes of tensors fit, and no more is checked; "
                "if that is another model, give the adapter's own"
            )

    @cached_property
    def _is_named(self) -> bool:
        """Whether the base is called what the adapter's config calls its own."""
        named = self.adapter.base_name
        if named is None:
            return False
        same = _same_place(named, self.base.donor.folder)
        return same or bool(_last_parts(named) & _names_of(self.base))

    def _leave_out_head(self) -> None:
        """A tied head's factors are the embeddings' again: two of one tensor. With another scale
        (of a pattern for one name) or DoRA's lengths (of its rows, and of the embeddings' columns)
        they make two tensors of it.
        """
        embedded = [each for each in self.factors.values() if each.embedding]
        heads = [each for name, each in self.factors.items() if ends(_weight(name), "lm_head")]
        if any(e.scale != h.scale or e.magnitude or h.magnitude for e in embedded for h in heads):
            return
        if embedded and heads:
            self.factors = {n: f for n, f in self.factors.items() if f not in heads}
            self.saved = {n: own for n, own in self.saved.items() if not ends(n, "lm_head")}

    # -------- names

    def _names(self) -> dict[str, str]:
        """The base's name for each tensor that the adapter changes; a tied head's is added."""
        wanted = dict.fromkeys(self._wanted())
        there = self.tensors.keys() | self._stacked.keys()
        names = {name: name for name in wanted if name in there}
        lost = [name for name in wanted if name not in names]
        for _ in range(_MAX_PREFIXES if lost else 0):
            taken = set(names.values())
            rest = [name for name in (*self.tensors, *self._stacked) if name not in taken]
            pair = renamed(lost, rest) or moved_part(lost, rest)
            if pair is None:
                break
            a, b = pair
            moved = {n: b + n[len(a) :] for n in lost if n.startswith(a)}
            names |= {name: to for name, to in moved.items() if to in there}
            lost = [name for name in lost if name not in names]
            hint = prefix_hint(a, str(self.adapter.path), b, self.base.label)
            self.note(f"{hint.partition('; rename')[0]}: they are taken for the same tensors")
        for name in [name for name in lost if ends(name, "lm_head")]:
            head = self.base.head
            if head is None and self._is_tied:
                self.tensors[name] = replace(self.tensors[self.base.embedding or ""], name=name)
                head = name
            if head is not None and head not in names.values():  # gpt_neox's files: embed_out
                names[name] = head
                lost.remove(name)
        if lost:
            more = and_others(len(lost))
            module = lost[0].removesuffix(".bias")
            if module in self.factors and self.factors[module].bias is not None:
                raise UnsupportedError(
                    f"'{self.adapter.path}' adds a bias (lora_bias) to '{module}'{more}, which has "
                    f"none in '{self.base.label}', nor a place for it; nor does PEFT merge it"
                )
            what = f"changes {show(lost[0])}{more}, which '{self.base.label}' lacks"
            if self._is_named:
                raise UnsupportedError(
                    f"'{self.adapter.path}' {what}, though its config names that base: "
                    "transformers calls a module otherwise than the files do, or ties it to "
                    "another; merge it with PEFT (merge_and_unload) first"
                )
            raise self._stranger(what)
        return names

    def _wanted(self) -> Iterator[str]:
        yield from (factors.target for factors in self.factors.values())
        yield from (f"{f.module}.bias" for f in self.factors.values() if f.bias is not None)
        yield from map(_weight, self.adapter.tokens)
        yield from self.saved

    @property
    def _is_tied(self) -> bool:
        base = self.base
        return base.head is None and base.embedding is not None and is_tied(base.config)

    @property
    def _keeps_tie(self) -> bool:
        """PEFT knows embeddings to tie by their name alone: not gpt2's."""
        named = ends(self.base.embedding or "", "embed_tokens")
        return named and bool(self.adapter.config.get("ensure_weight_tying"))

    def _check_whole(self, names: Mapping[str, str]) -> None:
        """Modules in all other layers of the stack, that the config means as well, have factors."""
        base = self.base
        have = {names[factors.target]: factors for factors in self.factors.values()}
        kinds = {
            (place.stack, place.rest): factors.matrices is not None
            for name, factors in have.items()
            if (place := layer_of(name)) is not None
        }
        lost = [
            name
            for name in (*base.tensors, *self._stacked)
            if name not in have
            and (place := layer_of(name)) is not None
            and (place.stack, place.rest) in kinds
            and place.number < base.count(place.stack)
            and self._means(name, parameter=kinds[place.stack, place.rest])
        ]
        if lost:
            more = and_others(len(lost))
            raise self._stranger(
                f"has no factors for '{lost[0]}'{more}, which its target_modules mean"
            )

    def _check_saved(self, names: Mapping[str, str]) -> None:
        """Modules that the config says are trained whole are there, where the base has such."""
        given = self.adapter.config.get("modules_to_save")
        wanted = set(given) if isinstance(given, list) else set()
        saved = {names.get(name, name) for name in self.adapter.saved}
        lost: dict[str, str] = {}  # by the config's name: a tensor of the base that it means
        found: set[str] = set()
        for name in self.base.tensors if wanted else ():
            module = name.rpartition(".")[0]
            for end in (module[at:] for at in starts(module) if module[at:] in wanted):
                lost.setdefault(end, name)
                if name in saved:
                    found.add(end)
        first = next((end for end in lost if end not in found), None)
        if first is not None:
            raise ModelError(
                f"'{self.adapter.path}': modules_to_save names {show(first)}, and the adapter has "
                f"nothing for {show(lost[first])}; one of its two files is stale: save it again"
            )

    def _means(self, name: str, *, parameter: bool) -> bool:
        """Whether the adapter's config means a tensor of the base, or does not say."""
        if parameter:
            return self.adapter.parameters.tell(name)
        return self.adapter.targets.tell(name.removesuffix(".weight")) is not False

    def _stranger(self, what: str) -> FastmergeError:
        named = self.adapter.base_name
        whose = f"; its config names '{named}' as base" if named else ""
        return ModelError(f"'{self.adapter.path}' {what}: it is for another base{whose}")

    # -------- tensors

    def _stored(self, name: str) -> Stored:
        info = self.adapter.tensors[name]
        return Stored(self.number, name, info.shape, info.dtype)

    def _leaf(self, name: str) -> tuple[TensorPlan, Leaf]:
        tensor = self.tensors[name]
        if not isinstance(tensor.root, Leaf) or not tensor.dtype.mergeable:
            raise UnsupportedError(
                f"tensor '{name}' of '{self.base.label}' is {tensor.dtype.name}, and an adapter is "
                "added to bfloat16, float16 or float32; fold it into the original weights"
            )
        return tensor, tensor.root

    def _replace(self, name: str, stored: str) -> None:
        """As the base's type, so that one model is of one type; other rows than the base's are a
        vocabulary's that was resized.
        """
        tensor, _ = self._leaf(name)
        new = self._stored(stored)
        if new.shape != tensor.shape and (len(new.shape) < 2 or new.shape[1:] != tensor.shape[1:]):
            raise self._stranger(
                f"has {show(stored)} of shape {list(new.shape)}, but '{name}' of "
                f"'{self.base.label}' is {list(tensor.shape)}"
            )
        self.tensors[name] = TensorPlan(name, new.shape, tensor.dtype, new)

    def _add(self, name: str, factors: Factors) -> None:
        tensor, leaf = self._leaf(name)
        shape, made = tensor.shape, (factors.out_size, factors.in_size)
        flat = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (0, 0)
        turned = len(shape) == 2 and shape == made[::-1]
        # Of a square one the shape does not tell, nor does fan_in_fan_out: PEFT goes by the
        # module's class, and writes down what the last of all modules was.
        transposed = turned and (
            factors.embedding or flat != made or (self._is_conv1d and layer_of(name) is not None)
        )
        if not transposed and (flat != made or factors.embedding):
            raise self._stranger(
                f"makes a {made[0]} x {made[1]} matrix for '{factors.module}', but '{name}' of "
                f"'{self.base.label}' is {list(shape)}"
            )
        lengths = None if factors.magnitude is None else self._stored(factors.magnitude)
        root = LowRank(
            leaf, self._stored(factors.a), self._stored(factors.b), factors.scale, transposed,
            lengths, shape,
        )  # fmt: skip
        self.tensors[name] = TensorPlan(name, shape, tensor.dtype, root)

    def _add_to_parameter(self, name: str, factors: Factors) -> None:
        """To what ``target_parameters`` names: one matrix or a stack, which may be stored as one
        tensor for each expert.
        """
        own, matrices = self._stacked.get(name), factors.matrices or 1
        made = (factors.out_size, factors.in_size)
        places = (Place(name),) if own is None else own.places
        for place in places:
            tensor, leaf = self._leaf(place.name)
            shape, of_one = tensor.shape, made
            if place.one is not None:
                of_one = (place.end - place.begin, made[1])
                fits = shape == of_one and own is not None and own.matrices == matrices
                fits = fits and made[0] == max(each.end for each in places)
                turned = False
            else:
                count = shape[0] if len(shape) == 3 else 1
                flat = count == matrices and shape[-2:] == made
                turned = count == matrices and len(shape) == 3 and shape[-2:] == made[::-1]
                turned = turned and (not flat or self._is_in_out)
                fits = len(shape) in (2, 3) and (flat or turned)
            if not fits:
                raise self._stranger(
                    f"makes {matrices} of {made[0]} x {made[1]} for '{factors.target}', but "
                    f"'{place.name}' of '{self.base.label}' is {list(shape)}"
                )
            stack = Stack(matrices, place.one, place.begin, place.end)
            root = LowRank(
                leaf, self._stored(factors.a), self._stored(factors.b), factors.scale, turned, None,
                shape, stack=stack,
            )  # fmt: skip
            self.tensors[place.name] = TensorPlan(place.name, shape, tensor.dtype, root)

    @cached_property
    def _stacked(self) -> dict[str, Module]:
        """What the base's modules have in other forms than its files."""
        named = any(factors.matrices is not None for factors in self.factors.values())
        return stacked(self.tensors) if named else {}

    @cached_property
    def _is_in_out(self) -> bool:
        """Whether experts are stored as (in, out), where their shapes do not tell: by those that
        tell, else by the model's class.
        """
        told = set()
        for factors in self.factors.values():
            tensor = self.tensors.get(factors.target)
            made = (factors.out_size, factors.in_size)
            if factors.matrices and tensor and len(tensor.shape) == 3 and made[0] != made[1]:
                told.add(tensor.shape[1:] == made[::-1])
        if len(told) == 1:
            return told.pop()
        return any(
            model_type(part) in IN_OUT for part in (self.base.config, text_config(self.base.config))
        )

    @cached_property
    def _is_conv1d(self) -> bool:
        """Whether the base's layers store matrices as (in, out), as gpt2's: those that are not
        square have a column for each number of their bias.
        """
        found = set()
        for name, tensor in self.base.tensors.items():
            bias = self.base.tensors.get(f"{name.removesuffix('.weight')}.bias")
            if bias is None or len(tensor.shape) != 2 or layer_of(name) is None:
                continue
            rows, cols = tensor.shape
            if rows != cols and bias.shape in ((rows,), (cols,)):
                found.add(bias.shape == (cols,))
        return found == {True}

    def _add_bias(self, name: str, stored: str, scale: float) -> None:
        tensor, leaf = self._leaf(name)
        new = self._stored(stored)
        if math.prod(new.shape) != tensor.count:
            raise self._stranger(f"has {show(stored)} of shape {list(new.shape)} for '{name}'")
        self.tensors[name] = replace(tensor, root=weighted_sum((leaf, new), (1.0, scale)))

    def _replace_rows(self, name: str, stored: str, indices: Collection[int]) -> None:
        tensor, leaf = self._leaf(name)
        new, shape = self._stored(stored), tensor.shape
        if len(shape) != 2 or new.shape[1:] != shape[1:] or max(indices, default=0) >= shape[0]:
            raise self._stranger(
                f"replaces rows of '{name}' that {list(shape)} in '{self.base.label}' does not have"
            )
        source, row = np.zeros(shape[0], np.int32), np.arange(shape[0])
        where = np.array(list(indices), np.int64)
        source[where], row[where] = 1, np.arange(len(where))
        places = RowMap(source, row, (), shape[0])
        dtype = leaf.dtype if leaf.dtype == new.dtype else F32
        root = Rows((leaf, new), (shape[0], new.shape[0]), places, shape, dtype)
        self.tensors[name] = TensorPlan(name, shape, tensor.dtype, root)

    def _with_head(self) -> dict[str, TensorPlan]:
        """A head that was tied to embeddings which now are others' stays what it was."""
        embedding = self.base.embedding
        if not self._is_tied or embedding is None or _HEAD in self.tensors:
            return self.tensors
        before, after = self.base.tensors[embedding], self.tensors[embedding]
        tied = self._keeps_tie or self.adapter.tokens
        if after is before or after.shape != before.shape or tied:
            return self.tensors
        if _is(self.base, ("ForConditionalGeneration", "ForMaskedLM")):
            # Untied, bart's encoder and decoder would be without embeddings.
            self.note(
                f"'{self.base.label}' ties its head to '{embedding}', which "
                f"'{self.adapter.path}' changes: it stays tied, to the changed one"
            )
        if not _is(self.base, CAUSAL):
            return self.tensors
        return {**self.tensors, _HEAD: replace(before, name=_HEAD)}

    # -------- beside the weights

    def _config(self, view: View) -> dict[str, object]:
        embedding = view.embedding
        config = view.config
        if embedding is None or view.tensors[embedding].shape == self.base.tensors[embedding].shape:
            return config
        rows = view.tensors[embedding].shape[0]
        changed = {k: dict(v) if isinstance(v, dict) else v for k, v in config.items()}
        set_tokens(changed, rows, {})
        self.note(f"'{self.adapter.path}' was trained with {rows} rows of embeddings: vocab_size")
        return changed

    def _vocabulary(self, view: View) -> Vocabulary | None:
        """The adapter's own tokenizer, where it has another than the base and rows for it."""
        adapter, base = self.adapter, self.base
        beside = side_files(adapter.path, adapter.files)
        files = {name: file for name, file in beside.items() if is_tokenizer(name)}
        label = str(adapter.path)
        if not identity(files):
            return base.vocabulary
        own = base.donor.side_files()
        template = template_of(files, label)
        if identity(files) == identity(own) and template in (None, template_of(own, base.label)):
            return base.vocabulary
        found = read_vocabulary(label, files, adapter.path)
        if found is None:
            return base.vocabulary
        rows = None if view.embedding is None else view.tensors[view.embedding].shape[0]
        if rows is not None and found.size > rows:
            self.note(
                f"'{label}' has a tokenizer of {found.size} tokens, for {rows} rows of embeddings: "
                f"that of '{base.label}' is taken"
            )
            return base.vocabulary
        if template is None and TEMPLATE in own:
            found = replace(found, files={**found.files, TEMPLATE: own[TEMPLATE]})
        self.note(f"the tokenizer is that of '{label}', which differs from that of '{base.label}'")
        return found


def _weight(module: str) -> str:
    return f"{module}.weight"


def _is(view: View, ends_in: tuple[str, ...]) -> bool:
    return any(name.endswith(ends_in) for name in classes_of(view.config))


def _same_place(reference: str, folder: Path | None) -> bool:
    """Whether a reference is the path of that folder; False where it is none here."""
    try:
        return folder is not None and os.path.samefile(reference, folder)
    except (OSError, ValueError):
        return False


def _names_of(base: View) -> set[str]:
    """What a base may be called: by the recipe, its folder, the Hub's cache and its own config."""
    own = base.config.get("_name_or_path")
    found = _last_parts(base.label) | _last_parts(own if isinstance(own, str) else "")
    if base.donor.folder is not None:
        place = Path(os.path.realpath(base.donor.folder))
        cached = hub_repository(place)
        found |= _last_parts(str(base.donor.folder)) | _last_parts(str(place))
        found |= set() if cached is None else {cached.name.rpartition("--")[2].lower()}
    return found


def _last_parts(reference: str) -> set[str]:
    """The last part of a path or a Hub id, in small letters, without its revision."""
    last = reference.rstrip("/").rpartition("/")[2].lower()
    return {last, last.partition("@")[0]} - {"", "."}
