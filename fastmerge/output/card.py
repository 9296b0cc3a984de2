"""The model card (README.md) of a merged model: what went in, how, and the recipe for it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING

from fastmerge.methods import Method
from fastmerge.tree.nodes import Merge, Stored, walk

if TYPE_CHECKING:
    from fastmerge.plan.plan import Plan


def model_card(plan: Plan, title: str) -> str:
    """The Markdown of README.md, with the front matter that the Hugging Face Hub reads.

    ``title`` is usually the output folder's name. The text depends on the plan, the models' content
    and fastmerge's version only, so that a merge done again writes the same file.
    """
    from fastmerge.version import __version__

    names = [
        display_name(reference, PurePath(model.label))
        for reference, model in zip(plan.references, plan.models, strict=True)
    ]
    sections = [
        _front_matter(names),
        f"# {title}",
        f"A merge of {len(names)} language models, made with fastmerge {__version__}.",
        "## Models\n\n" + _models_table(plan, names),
        "## Method\n\n" + _methods(plan),
        "## Recipe\n\n" + _fenced(plan.recipe_text, "yaml"),
    ]
    if plan.notes:
        sections.insert(-1, "## Notes\n\n" + _bullets(plan.notes))
    return "\n\n".join(sections) + "\n"


def display_name(reference: str, found: PurePath) -> str:
    """A model's name on a card: a Hub id as it is, a folder without the path to it. ``found`` is
    where it was read: a folder is found under its own name, a Hub id in a cache.

    A path on somebody's disk means nothing to the card's reader, and the Hub refuses it as a
    base_model.
    """
    path = PurePath(reference)
    is_path = path.is_absolute() or reference.startswith((".", "~")) or len(path.parts) > 2
    if not is_path and found.parts[-len(path.parts) :] != path.parts:
        return reference
    name = path.parent.name if path.suffix == ".safetensors" else path.name
    return name or reference


def _front_matter(names: Sequence[str]) -> str:
    import yaml

    front = {
        "base_model": list(dict.fromkeys(names)),
        "library_name": "transformers",
        "tags": ["merge", "fastmerge"],
    }
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---"


def _models_table(plan: Plan, names: Sequence[str]) -> str:
    """One row a model: in how many output tensors it takes part, as base or operand, and its
    fingerprint.
    """
    tensors: Counter[int] = Counter()
    as_base: Counter[int] = Counter()
    for tensor in plan.tensors:
        nodes = walk(tensor.root)
        tensors.update({node.model for node in nodes if isinstance(node, Stored)})
        as_base.update(
            {n.base.model for n in nodes if isinstance(n, Merge) and isinstance(n.base, Stored)}
        )
    lines = ["| model | tensors | role | fingerprint |", "|---|---:|---|---|"]
    for index, name in enumerate(names):
        role = "base" if as_base[index] else "source" if tensors[index] else "not used"
        digest = plan.models[index].fingerprint
        lines.append(f"| {_cell(name)} | {tensors[index]} | {role} | `{digest}` |")
    lines.append(
        "\n`fastmerge.json` has what each tensor came to: effective coefficients, entries kept."
    )
    return "\n".join(lines)


def _methods(plan: Plan) -> str:
    used: dict[str, Method] = {}
    tensors: Counter[str] = Counter()
    for tensor in plan.tensors:
        merges = [node for node in walk(tensor.root) if isinstance(node, Merge)]
        used.update((node.method.name, node.method) for node in merges)
        tensors.update({node.method.name for node in merges} or {""})
    copied = tensors.pop("", 0)
    items = [
        f"**{method.name}**, {method.summary} ({_link(method.paper)}): {_tensors(tensors[name])}"
        for name, method in used.items()
    ]
    if copied:
        items.append(f"copied as they are: {_tensors(copied)}")
    if plan.seed is not None:
        items.append(f"random seed: {plan.seed}")
    items.append("arithmetic in float32, reductions in float64, one rounding to the output's type")
    return _bullets(items)


def _tensors(count: int) -> str:
    return f"{count} tensor" + ("s" if count != 1 else "")


def _link(paper: str) -> str:
    """Turns the arXiv or DOI number of a method's paper into a link."""
    text = re.sub(r"arXiv:([\d.]+\d)", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)
    text = re.sub(
        r"doi:(10\.[^\s()]+(?:\([^\s()]*\)[^\s()]*)*)", r"[doi:\1](https://doi.org/\1)", text
    )
    return "no paper" if text == "-" else text


def _bullets(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
