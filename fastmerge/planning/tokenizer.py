"""The output's tokenizer, and every model's embeddings and head in its order of tokens.

The rules are mergekit 0.1.5's. The output's tokens are those of the base (``base``) or of a named
model, or the base's and behind them those of the others (``union``). A model's rows move to the
places of its tokens; a row that it lacks is the base's, else the only other model's that has the
token, else the mean of those that have it, unless ``tokens:`` names another source. Tokens without
a row, which a padded tokenizer may list, do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmerge.dtypes import F32
from fastmerge.errors import FastmergeError, ModelError, RecipeError, UnsupportedError, some_of
from fastmerge.models.architecture import vocabulary_names
from fastmerge.models.config import text_config, whole
from fastmerge.models.vocabulary import (
    TOKENIZER,
    Vocabulary,
    identity,
    is_same,
    read_generation,
    read_vocabulary,
)
from fastmerge.planning.config import token_ids
from fastmerge.planning.inputs import Input, Note, Part, TensorPlan, View
from fastmerge.recipe.tokenizer import TokenizerSection
from fastmerge.tree.nodes import MEAN, ZERO, Node, RowMap, Rows, Stored

Places = NDArray[np.int64]  # a row for each id of the output, -1 where there is none


@dataclass(frozen=True)
class Aligned:
    """What came of a document's tokenizer: its parts, its lead, and the output's tokens.

    vocabulary: None where the lead's files are taken as they are. rows: of the embeddings, where
    they are not the lead's. ids, generation: token ids of config.json and generation_config.json.
    """

    parts: Sequence[Part]
    lead: View
    vocabulary: Vocabulary | None = None
    rows: int | None = None
    ids: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)


class Vocabularies:
    """The vocabulary of each view, read once."""

    def __init__(self) -> None:
        self._read: dict[int, tuple[View, Vocabulary | None]] = {}

    def of(self, view: View) -> Vocabulary | None:
        if view.vocabulary is not None:
            return view.vocabulary
        if id(view.donor) not in self._read:
            donor = view.donor
            found = read_vocabulary(donor.label, donor.side_files(), donor.folder)
            self._read[id(view.donor)] = view, found
        return self._read[id(view.donor)][1]

    def needed(self, view: View, where: str) -> Vocabulary:
        found = self.of(view)
        if found is None:
            raise ModelError(
                f"{where}: '{view.label}' has no tokenizer files; put its tokenizer.json there"
            )
        return found


def align(
    parts: Sequence[Part],
    lead: View,
    has_base: bool,
    wanted: TokenizerSection,
    vocabularies: Vocabularies,
    tokenizer: Callable[[str, str], View | Vocabulary],
    model: Callable[[str, str], View],
    note: Note,
) -> Aligned:
    """The parts with every view's vocabulary tensors in the order of the output's tokenizer.

    lead: the base, or where there is none (``has_base``) the first model. tokenizer,
    model: what a reference stands for. Raises FastmergeError, one line, where the tokenizers cannot
    be merged.
    """
    views = _views(parts)
    where = wanted.at("source")
    source: View | Vocabulary | None = None
    if wanted.source not in ("union", "base"):
        source = tokenizer(wanted.source, where)
    if _are_one(views, source, wanted):
        if not identity(lead.donor.side_files()):
            note(
                f"nothing beside the weights of '{lead.label}' has a name that tokenizers have: "
                "equal numbers of rows are all that is checked"
            )
        else:
            for view in views:
                if not identity(view.donor.side_files()):
                    note(
                        f"'{view.label}' has no tokenizer files: its rows are taken to be in the "
                        f"order of '{lead.label}', of which there are as many"
                    )
        if source is None or (isinstance(source, View) and source.donor is lead.donor):
            return Aligned(parts, lead)
        # The tokens are the same, and the rest of the tokenizer may not be: its template, its ends.
        out = vocabularies.needed(source, where) if isinstance(source, View) else source
        old = vocabularies.needed(lead, where)
        return _with_ids(Aligned(parts, lead, out), old, out, source)
    aligner = _Aligner(parts, lead, views, source, wanted, vocabularies, model, note)
    return aligner.run(has_base)


def check_order(parts: Sequence[Part], lead: View, vocabularies: Vocabularies, note: Note) -> None:
    """Notes which models have tokens under other ids than the lead, where nobody asked."""
    own = lead.donor.side_files()
    for view in _views(parts):
        files = view.donor.side_files()
        if view.donor is lead.donor or TOKENIZER not in files or TOKENIZER not in own:
            continue
        if is_same(files, own):
            continue
        try:
            first, second = vocabularies.of(lead), vocabularies.of(view)
        except FastmergeError as error:
            note(f"whether tokens are in one order is not known: {error}")
            return
        assert first is not None and second is not None
        moved = [t for t, number in first.ids.items() if second.ids.get(t, number) != number]
        if moved:
            note(
                f"'{view.label}' has {len(moved)} tokens under other ids than '{lead.label}' "
                f"({_some(moved)}), so rows of different tokens are merged; write "
                "`tokenizer_source: base`"
            )


def _views(parts: Sequence[Part]) -> list[View]:
    """Every view once, in the recipe's order."""
    found: dict[int, View] = {}
    for part in parts:
        for item in part.inputs:
            found.setdefault(id(item.view), item.view)
    return list(found.values())


def _are_one(
    views: Sequence[View], source: View | Vocabulary | None, wanted: TokenizerSection
) -> bool:
    """Whether all that have tokenizer files have one vocabulary, told by the files alone, and all
    have as many rows.
    """
    if wanted.tokens or wanted.pad_to_multiple_of or any(view.vocabulary for view in views):
        return False
    files = {identity(view.donor.side_files()) for view in views}
    if isinstance(source, View):
        files.add(identity(source.donor.side_files()))
    elif source is not None:
        files.add(identity(source.files))
    shapes = {view.tensors[view.embedding].shape[0] if view.embedding else -1 for view in views}
    return len(files - {""}) <= 1 and len(shapes) == 1


class _Aligner:
    def __init__(
        self,
        parts: Sequence[Part],
        lead: View,
        views: list[View],
        source: View | Vocabulary | None,
        wanted: TokenizerSection,
        vocabularies: Vocabularies,
        model: Callable[[str, str], View],
        note: Note,
    ) -> None:
        self._parts, self._wanted, self._note = parts, wanted, note
        self._vocabularies, self._model = vocabularies, model
        self._where, self._config = wanted.where, lead.config
        self._lead = next(
            (v for v in views if v.donor is lead.donor and v.label == lead.label), lead
        )
        self.views = [self._lead, *(v for v in views if v is not self._lead)]
        self._base: View | None = None
        self._source = source
        if isinstance(source, View):
            self._source = next((v for v in views if v.donor is source.donor), source)
        self._own: dict[int, Vocabulary] = {}  # by id(view)
        self._rows: dict[int, int] = {}
        for view in self.views:
            self._add(view)

    # -------- what the models have

    def _add(self, view: View) -> None:
        if id(view) in self._own:
            return
        if view.embedding is None:
            raise UnsupportedError(
                f"{self._where}: '{view.label}' has no embeddings under a name that fastmerge "
                "knows, so its tokens cannot be moved; remove the tokenizer line where all models "
                "have one tokenizer"
            )
        rows = view.tensors[view.embedding].shape[0]
        stated = _stated_rows(view)
        if (
            stated is not None
            and stated != rows
            and isinstance(view.tensors[view.embedding].root, Stored)
        ):
            raise ModelError(
                f"{self._where}: config.json of '{view.label}' has vocab_size {stated} and its "
                f"{view.embedding} {rows} rows; mend the one that is wrong"
            )
        if view.head is not None and view.tensors[view.head].shape[0] != rows:
            raise UnsupportedError(
                f"{self._where}: '{view.label}' has {rows} rows in {view.embedding} and "
                f"{view.tensors[view.head].shape[0]} in {view.head}, so which are its tokens' is "
                "not known; give both as many first"
            )
        self._rows[id(view)] = rows
        found = self._vocabularies.of(view)
        if found is None:
            if view is self._lead:
                found = self._vocabularies.needed(view, self._where)
            elif rows != self._rows.get(id(self._lead), rows):
                raise ModelError(
                    f"{self._where}: '{view.label}' has no tokenizer files, and {rows} rows where "
                    f"'{self._lead.label}' has {self._rows[id(self._lead)]}; put its "
                    "tokenizer.json there"
                )
            else:
                found = self._vocabularies.needed(self._lead, self._where)
                self._note(
                    f"'{view.label}' has no tokenizer files: its tokens are taken for those of "
                    f"'{self._lead.label}'"
                )
        self._own[id(view)] = found

    def _usable(self, view: View) -> Vocabulary:
        """A model's vocabulary less the tokens that it has no row for."""
        own, rows = self._own[id(view)], self._rows[id(view)]
        beyond = {token for token, number in own.ids.items() if number >= rows}
        if beyond:
            self._note(
                f"'{view.label}' has {rows} rows: {len(beyond)} of its tokens have none and are "
                f"left out ({_some(sorted(beyond, key=own.ids.__getitem__))})"
            )
        return own.without(beyond)

    # -------- the output's

    def run(self, has_base: bool) -> Aligned:
        self._base = self._lead if has_base else None
        out = self._output()
        names = [out.tokens.get(number) for number in range(out.size)]
        multiple = self._wanted.pad_to_multiple_of or 1
        total = -(-out.size // multiple) * multiple
        places = {id(view): self._places(view, names) for view in self.views}
        same = all(
            self._rows[id(view)] == self._rows[id(self._lead)]
            and bool((places[id(view)] == np.arange(out.size)).all())
            for view in self.views
        )
        rows: int | None = None
        if same and not self._wanted.tokens and multiple == 1:
            parts, lead = self._parts, self._lead  # padding stays as it is
        else:
            rows = total
            self._note(f"tokenizer: {len(out.ids)} tokens, {self._whose()}; {total} rows")
            defaults = self._given(out, places)
            self._missing(names, places, defaults)
            parts = [self._part(part, names, places, defaults, total) for part in self._parts]
            alone = replace(self._parts[0], inputs=(Input(self._lead, 0, self._where, {}),))
            lead = self._part(alone, names, places, defaults, total).inputs[0].view
        # Which may say other than the model's own by now: of its head, of its codes.
        lead = replace(lead, config=self._config)
        old = self._own[id(self._lead)]
        plain = out is old and self._lead.vocabulary is None
        made = Aligned(parts, lead, None if plain else out, rows)
        return _with_ids(made, old, out, self._source)

    def _whose(self) -> str:
        if self._wanted.source in ("union", "base"):
            more = " and then the other models'" if self._wanted.source == "union" else ""
            return f"those of '{self._lead.label}'{more}"
        return f"those of '{self._wanted.source}'"

    def _output(self) -> Vocabulary:
        if isinstance(self._source, Vocabulary):
            out = self._source
        elif self._source is not None:
            if id(self._source) in self._own:
                out = self._usable(self._source)
            else:
                out = self._vocabularies.needed(self._source, self._where)
        else:
            out = self._usable(self._lead)
            if self._wanted.source == "union":
                usable = [self._usable(view) for view in self.views if view is not self._lead]
                out = out.with_tokens(
                    (other, token)
                    for other in usable
                    for token in sorted(other.ids, key=other.ids.__getitem__)
                )
        fresh = [token for token in self._wanted.tokens if token not in out.ids]
        if fresh:
            out = out.with_tokens((_known(token, out), token) for token in fresh)
        return out

    def _places(self, view: View, names: Sequence[str | None]) -> Places:
        own, rows = self._own[id(view)].ids, self._rows[id(view)]
        found = np.fromiter(
            (own.get(name, -1) if name is not None else -1 for name in names),
            np.int64,
            len(names),
        )
        found[found >= rows] = -1
        for number, name in enumerate(names):  # no token has this id
            if name is None and number < rows:
                found[number] = number
        return found

    # -------- rows that a model lacks

    def _given(
        self, out: Vocabulary, places: dict[int, Places]
    ) -> dict[int, tuple[View, int] | None]:
        """What ``tokens:`` names as the source of an id: a row of a view, or None for zeros."""
        found: dict[int, tuple[View, int] | None] = {}
        for token, entry in self._wanted.tokens.items():
            source, where = entry.source, entry.at("source")
            number = out.ids[token]
            if source is None:
                if all(place[number] < 0 for place in places.values()):
                    raise RecipeError(
                        f"{entry.where}: no model has the token {token!r}; give it a 'source:'"
                    )
                continue
            if source.model is None:
                found[number] = None
                continue
            view = self._model(source.model, where)
            view = next((v for v in self.views if v.donor is view.donor), view)
            if id(view) not in self._own:
                self._add(view)
            row, rows = source.token_id, self._rows[id(view)]
            if row is None:
                wanted = token if source.token is None else source.token
                row = self._own[id(view)].ids.get(wanted)
                if row is None or row >= rows:
                    raise RecipeError(
                        f"{where}: '{view.label}' has no token {wanted!r} to take the row of "
                        f"{token!r} from; name a model that has it"
                    )
            elif row >= rows:
                raise RecipeError(
                    f"{where}: '{view.label}' has {rows} rows and none with the token_id {row}"
                )
            found[number] = view, row
        return found

    def _missing(
        self,
        names: Sequence[str | None],
        places: dict[int, Places],
        defaults: Mapping[int, Any],
    ) -> None:
        """Says which tokens no model has a row for."""
        nobody = np.all([place < 0 for place in places.values()], axis=0)
        tokens = [
            names[i] for i in np.flatnonzero(nobody).tolist() if i not in defaults and names[i]
        ]
        if tokens:
            self._note(
                f"no model has a row for {len(tokens)} of the output's tokens, which are zeros "
                f"({_some(tokens)}); give them a source under 'tokenizer: tokens:'"
            )

    def _part(
        self,
        part: Part,
        names: Sequence[str | None],
        places: dict[int, Places],
        given: Mapping[int, tuple[View, int] | None],
        total: int,
    ) -> Part:
        """The part with each input's vocabulary tensors in the output's order."""
        inside = [v for v in self.views if any(item.view is v for item in part.inputs)]
        outside = [v for v in self.views if all(v is not own for own in inside)]
        owners = _Owners([*inside, *outside], len(inside), places, self._base)
        tokens = self._wanted.tokens
        forced = {
            number
            for number, name in enumerate(names)
            if name is not None and name in tokens and tokens[name].force
        }
        changed: dict[int, View] = {}
        for view in inside:
            changed[id(view)] = self._view(view, places[id(view)], forced, given, owners, total)
        inputs = tuple(replace(item, view=changed[id(item.view)]) for item in part.inputs)
        return replace(part, inputs=inputs)

    def _view(
        self,
        view: View,
        place: Places,
        forced: set[int],
        given: Mapping[int, tuple[View, int] | None],
        owners: _Owners,
        total: int,
    ) -> View:
        source = np.zeros(len(place), np.int32)
        row = place.copy()
        donors: list[View] = [view]
        means: dict[tuple[tuple[int, int], ...], int] = {}
        if forced:
            row[list(forced)] = -1

        def donor(other: View) -> int:
            for index, known in enumerate(donors):
                if known is other:
                    return index
            donors.append(other)
            return len(donors) - 1

        found: list[tuple[int, list[tuple[int, int]]]] = []
        for number in np.flatnonzero(row < 0).tolist():
            if number in given:
                one = given[number]
                terms = [] if one is None else [(donor(one[0]), one[1])]
            else:
                terms = [(donor(other), at) for other, at in owners.of(number)]
            found.append((number, terms))
        # Means of as many rows stand together, to be computed together.
        for number, terms in sorted(found, key=lambda item: len(item[1])):
            if not terms:
                source[number], row[number] = ZERO, 0
            elif len(terms) == 1:
                source[number], row[number] = terms[0]
            else:
                source[number] = MEAN
                row[number] = means.setdefault(tuple(terms), len(means))
        rows = RowMap(source, row, tuple(means), total)
        own = self._rows[id(view)]
        if own == total == len(row) and not source.any() and (row == np.arange(own)).all():
            return view
        tensors = dict(view.tensors)
        for name in vocabulary_names({n: t.shape for n, t in tensors.items()}):
            tensors[name] = self._rearranged(name, donors, rows)
        return replace(view, tensors=tensors)

    def _rearranged(self, name: str, donors: Sequence[View], rows: RowMap) -> TensorPlan:
        sources: list[Node] = []
        tensors = []
        for view in donors:
            tensor = view.tensors.get(name)
            if tensor is None:
                raise ModelError(
                    f"{self._where}: '{view.label}' lacks {name}, which '{donors[0].label}' needs "
                    "rows of"
                )
            if tensor.shape[1:] != donors[0].tensors[name].shape[1:]:
                raise ModelError(
                    f"{self._where}: {name} is {list(donors[0].tensors[name].shape)} in "
                    f"'{donors[0].label}' and {list(tensor.shape)} in '{view.label}': rows of one "
                    "do not fit the other"
                )
            if not tensor.dtype.mergeable:
                raise UnsupportedError(
                    f"{self._where}: {name} of '{view.label}' is {tensor.dtype.name}, whose rows "
                    "fastmerge does not move; convert it to bfloat16, float16 or float32 first"
                )
            sources.append(tensor.root)
            tensors.append(tensor)
        own = tensors[0]
        kinds = {root.dtype if isinstance(root, Stored) else F32 for root in sources}
        computed = bool(rows.means) or rows.total > rows.real
        dtype = F32 if computed or len(kinds) > 1 else kinds.pop()
        shape = (rows.total, *own.shape[1:])
        heights = tuple(tensor.shape[0] for tensor in tensors)
        leaf = Rows(tuple(sources), heights, rows, shape, dtype)
        return TensorPlan(own.name, shape, own.dtype, leaf)


def _with_ids(
    made: Aligned, old: Vocabulary, out: Vocabulary, source: View | Vocabulary | None
) -> Aligned:
    """With the ids of tokens in the lead's configs as the output's tokenizer has them."""
    if out is old:
        return made
    lead = made.lead
    of = source.config if isinstance(source, View) else {}
    ids = token_ids(lead.config, old, out, of)
    own = read_generation(lead.donor.side_files(), lead.label)
    theirs = {}
    if isinstance(source, View):
        theirs = {**of, **read_generation(source.donor.side_files(), source.label)}
    return replace(made, ids=ids, generation=token_ids(own, old, out, theirs))


class _Owners:
    """Whose row a token takes in a model that lacks it, where nothing else is said."""

    def __init__(
        self, views: Sequence[View], inside: int, places: dict[int, Places], base: View | None
    ) -> None:
        """``views``: the first ``inside`` of them are merged, the others only help out."""
        self._views, self._inside, self._base = views, inside, base
        self._places = [places[id(view)] for view in views]

    def of(self, number: int) -> list[tuple[View, int]]:
        """The rows to average; one, or none where nobody has the token."""
        for group in (slice(0, self._inside), slice(self._inside, None)):
            found = [
                (view, int(place[number]))
                for view, place in zip(self._views[group], self._places[group], strict=True)
                if place[number] >= 0
            ]
            for view, row in found:
                if view is self._base:
                    return [(view, row)]
            if found:
                return found
        return []


def _stated_rows(view: View) -> int | None:
    return whole(text_config(view.config), "vocab_size") or whole(view.config, "vocab_size") or None


def _known(token: str, out: Vocabulary) -> Vocabulary:
    """A vocabulary of one new token, to be split off the text wherever it stands."""
    info = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = {token: {**info, "special": False}}
    return replace(out, ids={token: 0}, added=added)


def _some(tokens: Sequence[Any]) -> str:
    return some_of([repr(token) for token in tokens], 5)
