"""The Python entry points behind ``fastmerge.merge`` and the command line."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypedDict

from fastmerge.arguments import a_flag, a_path, a_text, is_url, one_of
from fastmerge.collector import MERGING, rarely_collected
from fastmerge.compute.devices import GPU_MEMORY_BYTES, Device, a_device
from fastmerge.engine.in_memory import as_numbers, materialise_plan
from fastmerge.engine.merge import MAX_SHARD_BYTES, MEMORY_LIMIT_BYTES, Io, merge_plan
from fastmerge.engine.report import MergeReport
from fastmerge.errors import (
    MODELS_ALONE,
    FastmergeError,
    UnsupportedError,
    brief,
    enough_memory,
    in_words,
    is_whole,
)
from fastmerge.models.side_files import CARD_FILE, RECIPE_FILE
from fastmerge.models.state_dict import as_model
from fastmerge.output.card import model_card
from fastmerge.output.disk import facts_of
from fastmerge.output.provenance import provenance
from fastmerge.output.share import a_part
from fastmerge.planning.adapter_plan import AdapterPlan, is_of_adapters
from fastmerge.planning.loading import check_loading
from fastmerge.planning.plan import Plan
from fastmerge.planning.planner import make_plan, whole_seed
from fastmerge.progress import Shown, shown
from fastmerge.recipe.document import Recipe, typed
from fastmerge.recipe.source import read

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastmerge.engine.join import FinishReport
    from fastmerge.engine.verify import Verification
    from fastmerge.output.shipping import Destination
    from fastmerge.planning.adapters import AdapterMerge

# Silent unless a program asks: without a handler Python would print warnings.
_log = logging.getLogger("fastmerge")
_log.addHandler(logging.NullHandler())

SAMPLE = 16  # tensors that `verify` makes again

# The options that say how a folder is written, wherever its parts are merged.
_OF_WRITING: Final = (
    "threads", "memory_limit", "overwrite", "fresh",
    "io", "max_shard_bytes", "device", "gpu_memory",
)  # fmt: skip

Source = str | Path | Mapping[str, Any] | Sequence[Mapping[str, Any]] | Recipe | Plan
"""What a recipe may be given as: the path of a file, YAML text, a dictionary as YAML would have it,
a list of those (several documents), or a plan that was made of one."""


class MergeOptions(TypedDict, total=False):
    """Arguments of `merge` that `average` and `fold` pass on; meanings and defaults are there."""

    threads: int | None
    memory_limit: int
    overwrite: bool
    fresh: bool
    seed: int | None
    device: Device
    gpu_memory: int
    io: Io
    max_shard_bytes: int
    progress: Shown
    check: bool
    keep_paths: bool
    part: tuple[int, int] | str | None
    cluster: str | None


@enough_memory("plan")
def plan(
    recipe: Source,
    *,
    seed: int | None = None,
    models: Mapping[str, Any] | None = None,
    truncate_embeddings: bool = False,
) -> Plan:
    """What a merge of ``recipe`` would do, decided from the models' headers. Of the weights only
    integer tensors are read, which are copied where all models have the same.

    ``recipe``: a path, YAML text, a mapping, a list of mappings (several documents), or what `plan`
    gave. ``seed``: a whole number in [0, 2^64) from which methods that draw do so, in place of the
    recipe's. ``models``: what names in the recipe stand for, by name: a folder, a state dictionary,
    a module, or an object with the protocol `fastmerge.models.model.Model`; names that are not in
    it are folders, URLs or names on the Hub, as ever. ``truncate_embeddings``: where the recipe
    asks for no tokenizer, embeddings of different numbers of rows are cut to the fewest, which is
    right only where all models number their tokens alike.

    Returns the `Plan`: every tensor's shape, type and inputs, the config, notes; `Plan.describe`
    has it in plain values. Give it to `merge`, `materialise` or `verify` in the recipe's place and
    nothing is decided again. Raises RecipeError for what is asked for, ModelError for models that
    are damaged or do not fit, UnsupportedError for what is in order and not done: of a recipe of
    adapters alone, too, whose plan `fastmerge.api.decide` gives; FastmergeError for another
    argument.
    """
    decided = decide(recipe, seed=seed, models=models, truncate_embeddings=truncate_embeddings)
    if not isinstance(decided, Plan):
        raise UnsupportedError(
            "recipe: merges adapters alone, whose plan fastmerge.api.decide(recipe) gives; "
            "fastmerge.merge(recipe, out) merges them"
        )
    return decided


def decide(
    recipe: Source | AdapterMerge,
    *,
    seed: int | None = None,
    models: Mapping[str, Any] | None = None,
    truncate_embeddings: bool = False,
) -> Plan | AdapterMerge:
    """As `plan`, but of adapters alone, too.

    ``recipe``: a path, YAML text, a mapping, a list of mappings (several documents), or what `plan`
    gave. ``seed``: a whole number in [0, 2^64) from which methods that draw do so, in place of the
    recipe's. ``models``: what names in the recipe stand for, by name: a folder, a state dictionary,
    a module, or an object with the protocol `fastmerge.models.model.Model`; names that are not in
    it are folders, URLs or names on the Hub, as ever. ``truncate_embeddings``: where the recipe
    asks for no tokenizer, embeddings of different numbers of rows are cut to the fewest, which is
    right only where all models number their tokens alike.

    Returns a `Plan`, or an AdapterMerge where all models of the recipe are adapters, which `merge`
    takes as well. Raises RecipeError for what is asked for, ModelError for models that are damaged
    or do not fit, UnsupportedError for what is in order and not done, FastmergeError for another
    argument.
    """
    if isinstance(recipe, Plan):
        if recipe.seed is not None and seed is not None and whole_seed(seed) != recipe.seed:
            raise FastmergeError(f"seed: this plan has {recipe.seed} already; plan with {seed}")
        return recipe
    if isinstance(recipe, AdapterPlan):
        return recipe
    loaded = recipe
    if not isinstance(recipe, Recipe):
        documents, text, origin = read(recipe, "recipe")
        if models is None and is_of_adapters(documents):
            from fastmerge.planning.adapters import plan_adapters
            from fastmerge.recipe.adapters import AdapterRecipe

            own = None if seed is None else whole_seed(seed)
            given = AdapterRecipe.of(documents[0], text)
            made = plan_adapters(given, own)
            base = given.base_model
            if base is None:
                return made
            note = (
                f"all models are adapters, so the result is one, for '{base}'; for a model, write "
                f"'model: {base}+{given.models[0].model}'"
            )
            return replace(made, notes=(note, *made.notes))
        loaded = Recipe.of(documents, text, origin)
    if isinstance(models, Mapping):
        models = {name: as_model(given, str(name)) for name, given in models.items()}
    return make_plan(
        loaded, seed=seed, models=models, sparing=True, truncate_embeddings=truncate_embeddings
    )


def _url_of(out: str | Path) -> str | None:
    """The URL of an object store that ``out`` is, None for a path."""
    if not is_url(a_path(out, "out")):
        return None
    from fastmerge.output.upload import store_url

    return store_url(out)


def _to_store(
    recipe: Source | AdapterMerge, url: str, models: Mapping[str, Any] | None, options: MergeOptions
) -> MergeReport:
    """Merges to a folder of this machine, and uploads it."""
    from fastmerge.output.upload import Upload

    overwrite = a_flag(options["overwrite"], "overwrite")
    with Upload(url, overwrite=overwrite) as upload:
        decided = decide(recipe, seed=options["seed"], models=models)
        upload.check_inputs(_urls_of(decided))
        if options["part"] is not None:  # `finish` uploads
            upload.check_part()
            to = upload.destination("")
            return replace(_to_folder(decided, upload.folder, None, options, to), url=url)
        upload.check_whole()
        upload.lock()
        key = _job(decided, upload.folder.name, options)
        said = upload.merged(key)
        if said is not None and not options["fresh"]:
            report = MergeReport.of(said)
        else:
            options = {**options, "overwrite": True}
            report = _to_folder(decided, upload.folder, None, options, upload.destination(key))
            upload.note(key, report.as_dict())
        upload.send()
    return replace(report, url=url)


def _urls_of(decided: Plan | AdapterMerge) -> list[str]:
    """What is read of stores: their models' stamps begin with the URL of the folder."""
    stamps = decided.stamps if isinstance(decided, Plan) else []
    return [s[0] for s in stamps if isinstance(s, tuple) and isinstance(s[0], str)]


def _job(decided: Plan | AdapterMerge, name: str, options: MergeOptions) -> str:
    """What two merges have in common that write the same bytes to a folder of that ``name``."""
    beside = model_files(decided, name) if isinstance(decided, Plan) else {}
    known = sorted((file, facts_of(content)["sha256"]) for file, content in beside.items())
    return repr((decided.key, known, options["max_shard_bytes"], options["keep_paths"]))


@enough_memory("merge")
def merge(
    recipe: Source | AdapterMerge,
    out: str | Path,
    *,
    threads: int | None = None,
    memory_limit: int = MEMORY_LIMIT_BYTES,
    overwrite: bool = False,
    fresh: bool = False,
    seed: int | None = None,
    device: Device = "cpu",
    gpu_memory: int = GPU_MEMORY_BYTES,
    io: Io = "auto",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Shown = None,
    models: Mapping[str, Any] | None = None,
    check: bool = False,
    keep_paths: bool = False,
    part: tuple[int, int] | str | None = None,
    cluster: str | None = None,
) -> MergeReport:
    """Merges ``recipe`` into the new folder ``out``.

    ``recipe``: a path, YAML text, a mapping, a list of mappings (several documents), or what `plan`
    gave. ``out``: a path, or the URL of an object store (docs/remote.md). ``seed``: a whole number
    in [0, 2^64) from which methods that draw do so, in place of the recipe's. ``models``: what
    names in the recipe stand for, by name: a folder, a state dictionary, a module, or an object
    with the protocol `fastmerge.models.model.Model`; names that are not in it are folders, URLs or
    names on the Hub, as ever.

    ``threads``: of the CPU's pool, 1 to 1024, default FASTMERGE_NUM_THREADS or every CPU.
    ``memory_limit``: bytes of anonymous memory, 64 MiB or more. ``device``: "cpu", "cuda" or
    "auto", with the same bits; ``gpu_memory``: bytes of tensors in flight on each GPU. ``io``:
    "auto" writes past the page cache where the file system can, "direct" always, "buffered" never;
    ``max_shard_bytes``: bytes of one weight file at most.

    ``overwrite``: replace an ``out`` that is there, once the new one is complete; ``fresh``: ignore
    the working folder of an interrupted run, which the same call else continues. ``progress``: True
    for a bar on stderr, or a function of bytes done, bytes in all and a tensor's name, called after
    each tensor; what it raises ends the merge. ``check``: see first whether transformers' own class
    loads what would be written, which takes torch, transformers and accelerate. ``keep_paths``:
    card, recipe and lineage name the local folders as the recipe does, and not only what these are
    called. ``part``: (i, n), "i/n" or "auto" (by SLURM's array or RANK and WORLD_SIZE), to merge
    the i-th of n shares of the weight files alone; `finish` joins them, to the bytes of a merge
    without parts. ``cluster``: "auto" or the address of a Ray cluster, whose nodes merge the parts;
    all of them see ``out`` and the models under these paths (docs/parts.md).

    Returns a `MergeReport`. Raises RecipeError, ModelError, UnsupportedError as `plan` does,
    OutputError for what stands at ``out``, ResourceError for what the machine lacks, FastmergeError
    for another argument; all but a disk that fills up and a model that changes before a weight is
    written.

    The logger "fastmerge" says what is merged where, and each note (INFO), and which tensors have
    NaN or infinite values (WARNING).
    """
    options: MergeOptions = {
        "threads": threads, "memory_limit": memory_limit, "overwrite": overwrite, "fresh": fresh,
        "seed": seed, "device": device, "gpu_memory": gpu_memory, "io": io,
        "max_shard_bytes": max_shard_bytes, "progress": progress, "check": check,
        "keep_paths": keep_paths, "part": part, "cluster": cluster,
    }  # fmt: skip
    url = _url_of(out)
    if url is not None:
        return _to_store(recipe, url, models, options)
    return _to_folder(recipe, a_path(out, "out"), models, options)


@rarely_collected(MERGING)
def _to_folder(
    recipe: Source | AdapterMerge,
    folder: Path,
    models: Mapping[str, Any] | None,
    options: MergeOptions,
    to: Destination | None = None,
) -> MergeReport:
    title, progress = f"merging to {folder.name or folder}", options["progress"]
    part, cluster = options["part"], options["cluster"]
    chosen, choice = (None, "") if part is None else a_part(part)
    if chosen and cluster is not None:
        raise UnsupportedError("part and cluster: a cluster merges all parts; give one of them")
    decided = decide(recipe, seed=options["seed"], models=models)
    if a_flag(options["keep_paths"], "keep_paths"):
        decided = replace(decided, keep_paths=True)
    if not isinstance(decided, Plan):
        check_part(decided, chosen or cluster)
        device = options["device"]
        if a_device(device, "device") not in ("cpu", "auto"):
            raise UnsupportedError(
                f"device: adapters alone are merged on the CPU, not '{device}'; leave it out"
            )
        from fastmerge.engine.merge_adapters import merge_adapter_plan

        with shown(progress, title) as told:
            return merge_adapter_plan(
                decided, folder, threads=options["threads"], progress=told,
                overwrite=a_flag(options["overwrite"], "overwrite"),
                fresh=a_flag(options["fresh"], "fresh"),
            )  # fmt: skip
    if a_flag(options["check"], "check"):
        check_loading(decided)
    _log.info("merging %d tensors to %s", len(decided.tensors), folder)
    how: dict[str, Any] = {name: options[name] for name in _OF_WRITING}
    how["side_files"] = model_files(decided, folder.name)
    with shown(progress, title) as told:
        if cluster is None:
            report = merge_plan(decided, folder, part=chosen, progress=told, to=to, **how)
        else:
            from fastmerge.engine.on_ray import merge_on_cluster

            how["cluster"] = a_text(cluster, "cluster")
            report = merge_on_cluster(decided, folder, progress=told, **how)
    if choice:
        report = replace(report, notes=(choice, *report.notes))
    for note in report.notes:
        _log.info("%s", note)
    for name, count in report.nonfinite.items():
        _log.warning("%s: %d NaN or infinite values", name, count)
    return report


def check_part(decided: Plan | AdapterMerge, part: object) -> None:
    """Raises UnsupportedError where ``part`` is asked for of a merge that has none."""
    if part is not None and not isinstance(decided, Plan):
        raise UnsupportedError(
            "part: adapters alone make one small file, which has no parts; leave it out"
        )


@enough_memory("finish")
def finish(out: str | Path, *, overwrite: bool = False) -> FinishReport:
    """Joins the parts that `merge` wrote for the folder ``out``: checks that all are there, done,
    and of one plan, writes index, config, card and lineage, and shows the folder, whole. It needs
    no recipe and no model, may be run again after a kill, and reads no weights (`verify` does).

    ``out``: the path or URL that the parts were merged to. ``overwrite``: replace a folder that is
    there.

    Returns a `FinishReport`. Raises OutputError for parts that are missing, which it names, or not
    of one plan, FastmergeError for another argument.
    """
    from fastmerge.engine.join import finish as join
    from fastmerge.engine.join import joined_before

    url = _url_of(out)
    if url is None:
        return join(a_path(out, "out"), overwrite=overwrite)
    from fastmerge.output.upload import Upload

    with Upload(url, overwrite=a_flag(overwrite, "overwrite")) as upload:
        upload.lock()
        again = upload.is_joined()
        report = joined_before(upload.folder) if again else join(upload.folder, overwrite=True)
        upload.send()
    return replace(report, url=url)


# What errors say where base and adapter are arguments.
FOLDING = {
    **MODELS_ALONE,
    r"; name it behind its base: .*": "; give the base first, then the adapter",
}


@enough_memory("fold")
def fold(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    **options: Unpack[MergeOptions],
) -> MergeReport:
    """Writes the model ``base`` with the LoRA ``adapter`` on it to the new folder ``out``: what
    PEFT's merge_and_unload makes, W + s B A (Hu et al. 2021, arXiv:2106.09685), in fp32 and rounded
    once.

    ``base``, ``adapter``: folders or Hub ids; the adapter as PEFT saves it. ``out``: a path or URL.
    ``dtype``: of the output, default the base's (of codes in fp8 or MXFP4 what its config names;
    "as_base" writes codes and scales again). ``options``: the keyword arguments of `merge`, which
    it is, of the recipe ``base+adapter`` alone.

    Returns a `MergeReport`. Raises ModelError, before anything is written, where the adapter is not
    for this base, UnsupportedError for an adapter of a kind that is not done, and the errors of
    `merge`: OutputError, ResourceError, RecipeError, FastmergeError.
    """
    names = [str(a_path(value, name)) for value, name in ((base, "base"), (adapter, "adapter"))]
    with in_words(FOLDING):
        return merge(fold_recipe(*names, dtype=dtype), out, **options)


def fold_recipe(base: str, adapter: str, *, dtype: str | None = None) -> dict[str, Any]:
    """The recipe of `fold`."""
    recipe: dict[str, Any] = {"merge_method": "passthrough"}
    recipe["models"] = [{"model": f"{base}+{adapter}"}]
    if dtype is not None:
        recipe |= typed(a_text(dtype, "dtype"))
    return recipe


@enough_memory("verify")
def verify(
    folder: str | Path,
    against: Source | None = None,
    *,
    sample: int | None = SAMPLE,
    threads: int | None = None,
    progress: Shown = None,
    models: Mapping[str, Any] | None = None,
) -> Verification:
    """Whether ``folder`` is as a merge wrote it: the sizes and sha256 of its files, its headers,
    index and config, and the checksum of every tensor, as fastmerge.json has them. A checksum tells
    damage, not intent: whoever can change the weights can change fastmerge.json.

    ``folder``: of a model or an adapter, on this machine. ``against``: a recipe or plan that it is
    compared with too: names, types and shapes, config and side files, and ``sample`` tensors made
    again and compared bit for bit; where the recipe has no seed, with the one that the folder was
    written with. ``sample``: how many tensors, drawn at random; None for all. ``models``: what
    names in that recipe stand for, by name. ``threads``: of the CPU's pool, default
    FASTMERGE_NUM_THREADS or every CPU. ``progress``: True for a bar on stderr, or a function of
    bytes done, bytes in all and a tensor's name.

    Returns a `Verification`: what differs, one entry for each file or tensor, and what could not be
    checked, of a version that kept less. Raises ModelError where ``folder`` is none that fastmerge
    wrote, UnsupportedError for a URL, FastmergeError for another argument.
    """
    from fastmerge.engine.verify import verify_folder

    place = a_path(folder, "folder")
    if is_url(place) and not place.exists():
        raise UnsupportedError(
            f"{str(place).replace(':/', '://', 1)}: verify reads folders of this machine; download "
            "it, or compare it with another model by `fastmerge diff`"
        )
    if sample is not None and (not is_whole(sample) or sample < 0):
        raise FastmergeError(f"sample: {brief(sample)} is not a number of tensors, or None for all")

    def planner(seed: int | None) -> Plan:
        assert against is not None
        if isinstance(against, Plan):
            return against
        return plan(against, seed=seed, models=models)

    with shown(progress, f"verifying {place.name or place}") as told:
        return verify_folder(
            place,
            None if against is None else planner,
            sample=sample,
            threads=threads,
            progress=told,
        )


@enough_memory("check")
def check(recipe: Source, *, seed: int | None = None) -> Plan:
    """The plan of ``recipe``, where transformers' own class loads what it would write: no tensor
    missing, of another shape or without a place. Reads no weights; nothing of the models' own code
    is run.

    ``recipe``: a path, YAML text, a mapping, a list of mappings (several documents), or what `plan`
    gave. ``seed``: a whole number in [0, 2^64) from which methods that draw do so, in place of the
    recipe's.

    Returns the `Plan`. Raises ModelError where it would not load, UnsupportedError where
    transformers does not know the config's class, ResourceError where torch, transformers or
    accelerate are missing, and the errors of `plan`: RecipeError, FastmergeError.
    """
    decided = plan(recipe, seed=seed)
    check_loading(decided)
    return decided


def materialise(
    recipe: Source,
    *,
    seed: int | None = None,
    threads: int | None = None,
    models: Mapping[str, Any] | None = None,
    as_: Literal["bits", "numpy", "ml_dtypes", "torch"] = "bits",
) -> Iterator[tuple[str, Any]]:
    """Every tensor that ``merge`` would write, in memory and one after another; a few are computed
    ahead.

    ``recipe``: a path, YAML text, a mapping, a list of mappings (several documents), or what `plan`
    gave. ``seed``: a whole number in [0, 2^64) from which methods that draw do so, in place of the
    recipe's. ``models``: what names in the recipe stand for, by name: a folder, a state dictionary,
    a module, or an object with the protocol `fastmerge.models.model.Model`; names that are not in
    it are folders, URLs or names on the Hub, as ever. ``threads``: of the CPU's pool, default
    FASTMERGE_NUM_THREADS or every CPU. ``as_``: what is yielded. "bits": float64, float32 or
    float16 arrays, bfloat16 as its bits in uint16; of types that are only copied, raw bytes (uint8,
    one axis). "numpy": numbers, of NumPy's types, bfloat16 widened to float32. "ml_dtypes":
    bfloat16 and float8 as that package's types. "torch": tensors on the CPU. What has no type there
    stays raw bytes.

    Yields (name, array). Raises RecipeError, ModelError, UnsupportedError as `plan` does,
    ResourceError for a package that ``as_`` needs, FastmergeError for another argument.
    """
    kind = one_of(as_, ("bits", "numpy", "ml_dtypes", "torch"), "as_")
    decided = plan(recipe, seed=seed, models=models)
    with enough_memory("materialise"):
        for item, array in materialise_plan(decided, threads=threads):
            yield item.name, array if kind == "bits" else as_numbers(item, array, kind)


def model_files(plan: Plan, title: str) -> dict[str, bytes | Path]:
    """What is written beside the weights, by name: the donor's side files, config, card, recipe."""
    files = plan.side_files()
    if plan.config:
        files["config.json"] = (json.dumps(plan.config, indent=2) + "\n").encode()
    # Whatever the name: the writer refuses one that is no UTF-8.
    files[CARD_FILE] = model_card(plan, title, files).encode(errors="backslashreplace")
    files[RECIPE_FILE] = provenance(plan).recipe_text.encode()
    return files
