"""``fastmerge info`` and ``fastmerge diff``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from fastmerge.cli.app import Json, Threads, command
from fastmerge.cli.console import pairs, print_json, put, say, table
from fastmerge.cli.options import Argument, Option
from fastmerge.units import format_bytes, format_count

if TYPE_CHECKING:
    from fastmerge.models.diff import Comparison, TensorDifference

_MOST_NAMES = 5


@command
def info(
    model: Annotated[str, Argument(help="Folder, file, Hub id or URL; an adapter's folder too.")],
    json: Json = False,
) -> None:
    """Say what MODEL is: architecture, parameters, types, files, fingerprint."""
    from fastmerge.models.adapter import is_adapter
    from fastmerge.models.hub import is_remote
    from fastmerge.models.summary import open_named, place_of, summarise

    if not is_remote(model):
        path = place_of(model)
        if is_adapter(path):
            return _adapter_info(path, json)
    found = summarise(open_named(model))
    if json:
        print_json(found.as_dict())
        return
    tied = {None: "not said", True: "yes", False: "no"}[found.tie_word_embeddings]
    rows = [
        ("model", found.path),
        ("architecture", f"{found.architecture or 'not said'} ({found.model_type or 'no type'})"),
        ("parameters", f"{format_count(found.parameters)} ({found.parameters})"),
        ("tensors", f"{found.tensors}, {format_bytes(found.bytes)}"),
        *(
            (
                f"  {kind.dtype}",
                f"{kind.tensors} tensors, {format_count(kind.parameters)} parameters",
            )
            for kind in found.types
        ),
        *([("codes", found.codes)] if found.codes else []),
        (
            "prefix",
            f"{found.prefix or 'none'}; layers {f'{found.layers}.N' if found.layers else 'none'}",
        ),
        ("tied embeddings", f"{tied}; lm_head {'stored' if found.has_lm_head else 'not stored'}"),
        *found.sizes.items(),
        ("files", ""),
        *((f"  {name}", format_bytes(size)) for name, size in found.files.items()),
        ("side files", ", ".join(found.side_files) or "none"),
        ("fingerprint", found.fingerprint),
        *(("note", line) for line in found.code),
    ]
    pairs(rows)


def _adapter_info(path: Path, json: bool) -> None:
    from fastmerge.models.summary import summarise_adapter

    found = summarise_adapter(path)
    if json:
        print_json(found.as_dict())
        return
    shown = found.saved[:_MOST_NAMES]
    more = f", and {len(found.saved) - len(shown)} more" if len(found.saved) > len(shown) else ""
    rows = [
        ("adapter", found.path),
        ("kind", " ".join(["LoRA", *found.kinds])),
        ("base", found.base or "not said"),
        ("task", found.task or "not said"),
        ("rank", ", ".join(map(str, found.ranks)) or "none"),
        ("scale", ", ".join(f"{scale:.6g}" for scale in found.scales[:_MOST_NAMES]) or "none"),
        ("modules", ", ".join(f"{n} {name}" for name, n in found.modules.items()) or "none"),
        ("replaced", (", ".join(shown) + more) or "nothing"),
        *([("rows replaced", found.tokens)] if found.tokens else []),
        ("parameters", f"{format_count(found.parameters)} ({found.parameters})"),
        ("tensors", f"{found.tensors}, {format_bytes(found.bytes)}"),
        ("fingerprint", found.fingerprint),
    ]
    pairs(rows)


@command
def diff(
    a: Annotated[str, Argument(help="Folder, file, Hub id or URL.")],
    b: Annotated[str, Argument(help="Folder, file, Hub id or URL.")],
    limit: Annotated[
        int | None, Option(help="Show only the N tensors that differ most.", min=1)
    ] = None,
    plot: Annotated[
        Path | None, Option(metavar="FILE", help="A PNG of the relative change, layer by kind.")
    ] = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Compare the weights of A and B, tensor by tensor."""
    if plot is not None:
        from fastmerge.cli.files import check_file
        from fastmerge.search.figures import require

        check_file(plot, "--plot")
        require()
    from fastmerge.compute.cpu import isa, thread_count
    from fastmerge.models.diff import compare
    from fastmerge.models.summary import codes_of, open_named

    isa()
    models = open_named(a), open_named(b)
    found = compare(*models, threads=thread_count(threads))
    for model in models:
        codes = codes_of(model)
        if codes:
            say(
                f"note: {model.label} is {codes}: codes are compared, not what they stand for; a "
                "recipe with `merge_method: passthrough` and `dtype: bfloat16` writes the numbers"
            )
    shown = found.tensors if limit is None else found.largest(limit)
    if json:
        print_json(replace(found, tensors=shown).as_dict() | {"same": found.same})
    else:
        _show(found, shown)
    if plot is not None:  # last: what cannot be drawn costs no answer
        from fastmerge.cli.change_map import write_change_map

        write_change_map(found.tensors, plot)
        say(f"note: {plot}: the relative change, layer by kind")


def _show(found: Comparison, shown: Sequence[TensorDifference]) -> None:
    """The table of the tensors ``shown``, then what is said of the whole."""
    if shown:
        table(
            ("tensor", "shape", "type", "max", "mean", "relative", "cosine", "changed"),
            (
                (
                    tensor.name,
                    "x".join(map(str, tensor.shape)) or "-",
                    tensor.dtype_a
                    if tensor.dtype_a == tensor.dtype_b
                    else f"{tensor.dtype_a}/{tensor.dtype_b}",
                    _figure(tensor.max_abs, ".3g"),
                    _figure(tensor.mean_abs, ".3g"),
                    _figure(tensor.relative, ".3%"),
                    _figure(tensor.cosine, ".6f"),
                    _figure(tensor.changed_fraction if tensor.counted else None, ".2%")
                    + (f" ({tensor.nonfinite} not finite)" if tensor.nonfinite else ""),
                )
                for tensor in shown
            ),
            right=("max", "mean", "relative", "cosine", "changed"),
            spare=("shape", "mean", "type"),
        )
    for name, shape_a, shape_b in found.reshaped:
        put(f"{name}: shape {list(shape_a)} in A, {list(shape_b)} in B")
    for place, names in (("A", found.only_in_a), ("B", found.only_in_b)):
        for name in names:
            put(f"{name}: only in {place}")
    put(found.verdict())


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
