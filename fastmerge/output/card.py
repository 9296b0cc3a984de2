"""The model card (README.md) of a merged model: what went in, how, and the recipe for it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from fastmerge.errors import printable
from fastmerge.methods import Method
from fastmerge.models.config import CAUSAL, classes_of
from fastmerge.models.side_files import is_tokenizer
from fastmerge.output.provenance import (
    Provenance,
    as_list,
    is_plain,
    licence,
    licence_name,
    provenance,
)
from fastmerge.tree.nodes import Dequantised, Leaf, LowRank, Made, Rows, walk

if TYPE_CHECKING:
    from fastmerge.planning.inputs import TensorPlan
    from fastmerge.planning.plan import Plan

_COPIED = "copied as they are"
_FOLDED = (
    "an adapter folded into the base's weight, W + s B A "
    "([arXiv:2106.09685](https://arxiv.org/abs/2106.09685))"
)
_MOST_TAGS = 50


def model_card(plan: Plan, title: str, beside: Iterable[str] = ()) -> str:
    """The Markdown of README.md, with the front matter that the Hugging Face Hub reads.

    ``title`` is usually the output folder's name; ``beside``, the files beside the weights. The
    text depends on these, the models' content and fastmerge's version only, so that a merge done
    again writes the same file.
    """
    from fastmerge.version import __version__

    said = provenance(plan)
    notes = [escaped(said.told(note)) for note in plan.notes]
    sections = [
        _front_matter(plan, said),
        f"# {escaped(title)}",
        f"A merge of {len(said.names)} language models, made with fastmerge {__version__}.",
        "## Models\n\n" + _models_table(plan, said.names),
        "## Method\n\n" + _methods(plan),
        "## Use\n\n" + _use(plan, title, any(map(is_tokenizer, beside))),
        *_licences(said),
        *(["## Notes\n\n" + bullets(notes)] if notes else []),
        "## Recipe\n\n" + fenced(said.recipe_text, "yaml"),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(plan: Plan, said: Provenance) -> str:
    """What the Hub reads: ids only where there are ids, and what the inputs' own cards say."""
    donor = said.cards[plan.models.index(plan.donor_model)]
    front: dict[str, Any] = {}
    ids = dict.fromkeys(name for names in said.hub_ids for name in names)
    if ids:
        front["base_model"] = list(ids)
    library = donor.get("library_name")
    front["library_name"] = library if is_plain(library) else "transformers"
    task = donor.get("pipeline_tag")
    if is_plain(task):
        front["pipeline_tag"] = task
    elif _class_of(plan).endswith(CAUSAL):
        front["pipeline_tag"] = "text-generation"
    front |= licence(said.cards)
    languages = union(_norwegian(card.get("language")) for card in said.cards)
    if languages:
        front["language"] = languages
    tags = union(card.get("tags") for card in said.cards)
    front["tags"] = list(dict.fromkeys(["merge", "fastmerge", *tags]))
    return front_matter_text(front)


def front_matter_text(front: dict[str, Any]) -> str:
    """The block at the head of a card."""
    import yaml

    text = yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{text}---"


def union(values: Iterable[Any]) -> list[str]:
    """The words of several cards' values, each once."""
    found = dict.fromkeys(item for value in values for item in as_list(value))
    # Those with a colon are the Hub's own: ``base_model:...``, ``region:us``.
    return [item for item in found if ":" not in item][:_MOST_TAGS]


def _norwegian(value: Any) -> Any:
    """A card's language or languages; YAML reads Norwegian's code, ``no``, as false."""
    if isinstance(value, list):
        return [_norwegian(item) for item in value]
    return "no" if value is False else value


def _class_of(plan: Plan) -> str:
    """The name of transformers' class for the output, "" where the config has none."""
    return next(iter(classes_of(plan.config)), "")


def _use(plan: Plan, title: str, has_tokenizer: bool) -> str:
    auto, own = "AutoModel", _class_of(plan)
    own = own if is_plain(own) else ""  # a config may name one of a megabyte
    if own.endswith(CAUSAL):
        auto = "AutoModelForCausalLM"
    elif own.isidentifier() and own.isascii() and "auto_map" not in plan.config:
        auto = own  # t5's with its head, say
    trust = ", trust_remote_code=True" if "auto_map" in plan.config else ""
    folder = json.dumps(f"path/to/{printable(title)}", ensure_ascii=False)
    lines = [
        f"from transformers import {auto}{', AutoTokenizer' if has_tokenizer else ''}\n",
        f"folder = {folder}",
        f'model = {auto}.from_pretrained(folder, dtype="auto"{trust})',
    ]
    if has_tokenizer:
        lines.append(f"tokenizer = AutoTokenizer.from_pretrained(folder{trust})")
    return fenced("\n".join(lines), "python")


def _licences(said: Provenance) -> list[str]:
    """A section where the inputs' licences are not one and the same."""
    licences = [licence_name(card) for card in said.cards]
    if len(set(licences)) < 2:
        return []
    items = (
        f"{escaped(name)}: {escaped(text) or 'its card names none'}"
        for name, text in zip(said.names, licences, strict=True)
    )
    return ["## Licences\n\nOf the models that went in:\n\n" + bullets(items)]


def _models_table(plan: Plan, names: Sequence[str]) -> str:
    """One row a model: in how many output tensors it takes part, as base or operand, and its
    fingerprint.
    """
    tensors: Counter[int] = Counter()
    as_base: Counter[int] = Counter()
    for tensor in plan.tensors:
        for model in {stored.model for stored in tensor.sources}:
            tensors[model] += 1
        bases = {node.base for node in tensor.merges if isinstance(node.base, Leaf)}
        for model in {base.own.model for base in bases if base.own is not None}:
            as_base[model] += 1
    lines = ["| model | tensors | role | fingerprint |", "|---|---:|---|---|"]
    for index, name in enumerate(names):
        role = "base" if as_base[index] else "source" if tensors[index] else "not used"
        digest = plan.models[index].fingerprint
        lines.append(f"| {escaped(name)} | {tensors[index]} | {role} | `{digest}` |")
    lines.append(
        "\n`fastmerge.json` has what each tensor came to: effective coefficients, entries kept."
    )
    return "\n".join(lines)


def _methods(plan: Plan) -> str:
    used: dict[str, Method] = {}
    tensors: Counter[str] = Counter()
    for tensor in plan.tensors:
        own = {node.method.name: node.method for node in tensor.merges}
        used |= own
        folded = any(isinstance(node, LowRank) for node in walk(tensor.root))
        tensors.update((*own, *((_FOLDED,) if folded else ())) or (_taken(tensor),))
    items = [
        f"**{method.name}**, {method.summary} ({_link(method.paper)}): {_tensors(tensors[name])}"
        for name, method in used.items()
    ]
    others = sorted((name for name in tensors if name not in used), key=_COPIED.__eq__)
    items += [f"{name}: {_tensors(tensors[name])}" for name in others]
    if plan.seed is not None:
        items.append(f"random seed: {plan.seed}")
    double = [tensor.in_float64 for tensor in plan.tensors if tensor.merges]
    arithmetic = "float64" if double and all(double) else "float32, reductions in float64"
    if any(double) and not all(double):
        arithmetic = f"float64 of {_tensors(sum(double))}, of the others in float32"
    items.append(f"arithmetic in {arithmetic}, one rounding to the output's type")
    return bullets(items)


def _taken(tensor: TensorPlan) -> str:
    """What is done where nothing is merged."""
    root = tensor.root
    if isinstance(root, Made):
        return f"made: {root.kind}"
    if isinstance(root, Rows):
        return "rows put where the output has their tokens"
    if isinstance(root, Dequantised) and tensor.encoding is None:
        return "the numbers of their codes"
    return _COPIED


def _tensors(count: int) -> str:
    return f"{count} tensor" + ("s" if count != 1 else "")


def _link(paper: str) -> str:
    """Turns the arXiv or DOI number of a method's paper into a link."""
    text = re.sub(r"arXiv:([\d.]+\d)", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)
    text = re.sub(
        r"doi:(10\.[^\s()]+(?:\([^\s()]*\)[^\s()]*)*)", r"[doi:\1](https://doi.org/\1)", text
    )
    return "no paper" if text == "-" else text


def bullets(items: Iterable[str]) -> str:
    """A list in Markdown."""
    return "\n".join(f"- {item}" for item in items)


def escaped(text: str) -> str:
    """A stranger's text in a line of Markdown: shown as it is, and no markup, HTML or link."""
    text = re.sub(r"([\\`*\[\]<>|&~#]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", printable(text))
    # What makes lists and rules at the beginning of an item, and code; at the end, bold no more.
    text = re.sub(r"^([+-]|\d{1,9}(?=[.)](?:\s|$)))", _unmarked, text)
    text = re.sub(r"^ +| +$", lambda spaces: "&#32;" * len(spaces[0]), text)
    text = text.replace("$", "&#36;")  # of formulas
    # GitHub and the Hub make links of bare addresses, of mail whatever is escaped in it.
    text = re.sub(r"@(?=[\w.\\-]*\.)", "@&#8203;", text)
    return re.sub(
        r"(?i)://|www\.", lambda m: m[0].replace("/", "&#47;").replace(".", "&#46;"), text
    )


def _unmarked(mark: re.Match[str]) -> str:
    return f"{mark[0]}\\" if mark[0].isdecimal() else f"\\{mark[0]}"


def fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
