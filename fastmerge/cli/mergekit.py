"""mergekit 0.1.5's ``mergekit-yaml`` and ``mergekit-multi``, so that a line from a model card runs
with ``fastmerge`` put in front.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastmerge.cli.app import ABSENT, ELSEWHERE, command
from fastmerge.cli.console import Progress, say
from fastmerge.cli.merge import interruptible, tell
from fastmerge.cli.options import Argument, Option
from fastmerge.errors import FastmergeError
from fastmerge.units import parse_shard_size

if TYPE_CHECKING:
    from fastmerge.recipe.document import Recipe

ABSENT |= dict.fromkeys(
    (
        "mergekit-evolve", "mergekit-layershuffle", "mergekit-legacy", "mergekit-pytorch",
        "mergekit-tokensurgeon",
    ),
    "is not there yet; of mergekit's commands there are mergekit-yaml, mergekit-multi, "
    "mergekit-moe and mergekit-extract-lora",
)  # fmt: skip

ABSENT |= {
    "mergekit-mega": "is called mergekit-multi",
    "bakllama": "is not there; write its layers under 'slices:', for mergekit-yaml",
}

# What mergekit-yaml and mergekit-moe never had, and what people write all the same.
_FOLDER = "write the folder to write behind the recipe, without an option"
ELSEWHERE["mergekit-yaml"] = ELSEWHERE["mergekit-moe"] = {
    **dict.fromkeys(
        ("--output", "-o", "--output-dir", "--output_dir", "--out-dir", "--out_dir", "--out-path"),
        _FOLDER,
    ),
    **dict.fromkeys(("--config", "-c"), "write the recipe first, without an option"),
    **dict.fromkeys(("--cpu-only", "--cpu"), "leave it out: without --cuda it is the CPU"),
    "--tokenizer-source": "write `tokenizer_source:` in the recipe",
    "--dtype": "write `dtype:` in the recipe",
}

_NO_USE = "has no use here; leave it out"
_YAML = "`fastmerge mergekit-yaml` follows it"
ELSEWHERE["merge"] = ELSEWHERE["moe"] = ELSEWHERE["plan"] = {
    **dict.fromkeys(
        (
            "--allow-crimes", "--async-write", "--clone-tensors", "--copy-tokenizer",
            "--lazy-unpickle", "--lora-merge-cache", "--lora-merge-dtype", "--low-cpu-memory",
            "--no-allow-crimes", "--no-async-write", "--no-clone-tensors", "--no-lazy-unpickle",
            "--no-low-cpu-memory", "--no-multi-gpu", "--no-quiet", "--no-read-to-gpu",
            "--no-trust-remote-code", "--no-unsafe-truncate-embeddings", "--read-to-gpu",
            "--safe-serialization", "--trust-remote-code", "--write-model-card", "--write-threads",
            "-v",
        ),
        _NO_USE,
    ),
    **dict.fromkeys(
        (
            "--no-copy-tokenizer", "--no-write-model-card", "--unsafe-truncate-embeddings",
        ),
        _YAML,
    ),
    "--cuda": "write --device cuda",
    "--gpu-rich": "write --device cuda",
    "--multi-gpu": "write --device cuda, which takes every GPU",
    "--no-cuda": "write --device cpu",
    "--no-safe-serialization": "fastmerge writes safetensors only",
    "--num-threads": "write --threads",
    "-j": "write --threads",
    "--out-shard-size": "write --max-shard-size",
    "--random-seed": "write --seed",
    "--transformers-cache": f"set HF_HUB_CACHE; {_YAML}",
}  # fmt: skip


def _switch(text: str) -> Option:
    return Option(help=text, either=True)


class Options:
    """mergekit's, by its names; None where they are not given. For its annotations alone."""

    allow_crimes: Annotated[bool | None, _switch("No effect: what does not fit is refused.")]
    unsafe_truncate_embeddings: Annotated[
        bool | None, _switch("UNSAFE: cut embeddings to the smallest vocabulary.")
    ]
    trust_remote_code: Annotated[bool | None, _switch("No effect: no model's code is run.")]
    transformers_cache: Annotated[Path | None, Option(help="huggingface_hub's cache folder.")]
    lora_merge_cache: Annotated[str | None, Option(help="No effect.")]
    lora_merge_dtype: Annotated[str | None, Option(help="No effect.")]
    random_seed: Annotated[int | None, Option(help="For random methods.", min=0)]
    verbosity: Annotated[int | None, Option("-v", help="No effect.", count=True)]
    quiet: Annotated[bool | None, _switch("No progress, no summary.")]
    cuda: Annotated[bool | None, _switch("Compute on the GPUs.")]
    device: Annotated[str | None, Option(help="cpu, cuda, auto, or cuda:N.")]
    low_cpu_memory: Annotated[bool | None, _switch("No effect.")]
    lazy_unpickle: Annotated[bool | None, _switch("No effect: only safetensors are read.")]
    read_to_gpu: Annotated[bool | None, _switch("No effect.")]
    multi_gpu: Annotated[bool | None, _switch("The same as --cuda, which takes every GPU.")]
    num_threads: Annotated[int | None, Option("--num-threads", "-j", help="Worker threads.", min=1)]
    gpu_rich: Annotated[bool | None, Option("--gpu-rich", help="The same as --cuda.")]
    async_write: Annotated[bool | None, _switch("No effect: it always does.")]
    write_threads: Annotated[int | None, Option(help="No effect.")]
    out_shard_size: Annotated[
        str | None, Option(metavar="SIZE", help="Largest weight file, as 5B or 5GB.")
    ]
    copy_tokenizer: Annotated[bool | None, _switch("Write a tokenizer.")]
    clone_tensors: Annotated[bool | None, _switch("No effect.")]
    write_model_card: Annotated[bool | None, _switch("Write README.md and the recipe.")]
    safe_serialization: Annotated[bool | None, _switch("Safetensors, which is all there is.")]


Config = Annotated[Path, Argument(metavar="CONFIG_FILE", help="Recipe in mergekit's YAML.")]


@command
def mergekit_yaml(
    config_file: Config,
    out_path: Annotated[Path, Argument(metavar="OUT_PATH", help="Folder to write.")],
    **options: Annotated[Any, Options],
) -> None:
    """Do what mergekit-yaml does, by its options."""
    from fastmerge.recipe.document import Recipe

    given = given_options(options)
    merge_given(Recipe.load(config_file), out_path, given)


@command
def mergekit_multi(
    config_file: Config,
    *,
    intermediate_dir: Annotated[
        Path, Option("--intermediate-dir", "-I", help="Where merges that have a name go.")
    ],
    out_path: Annotated[Path | None, Option(help="Where the one without a name goes.")] = None,
    lazy: Annotated[bool, Option(help="Skip merges that are there.", either=True)] = True,
    **options: Annotated[Any, Options],
) -> None:
    """Do what mergekit-multi does: merges that name each other, in one pass each."""
    from fastmerge.models.folder import INDEX, SINGLE
    from fastmerge.recipe.document import Recipe

    recipes = Recipe.load_each(config_file)
    if out_path is None and any(recipe.output.name is None for recipe in recipes):
        raise FastmergeError("--out-path is missing: one of the merges has no 'name:'")
    given = given_options(options)
    within = dict.fromkeys(str(d.name) for recipe in recipes for d in recipe.documents[:-1])
    if within:
        say(
            f"note: {', '.join(within)}: computed within the merges that name them, and not stored "
            f"in {intermediate_dir}",
            quiet=bool(given.get("quiet")),
        )
    for recipe in recipes:
        name = recipe.output.name
        out = intermediate_dir / name if name is not None else out_path
        assert out is not None
        weights = any((out / file).is_file() for file in (SINGLE, INDEX))
        if lazy and weights and (out / "config.json").is_file():
            say(f"note: {out}: is there, and skipped; --no-lazy merges it again")
            continue
        merge_given(recipe, out, given)


def given_options(
    options: dict[str, Any], no_effect: Collection[str] | None = None
) -> dict[str, Any]:
    """What was asked for; says what of it has no effect."""
    from fastmerge.integrations.mergekit import NO_EFFECT

    no_effect = NO_EFFECT if no_effect is None else no_effect
    given = {k: v for k, v in options.items() if v is not None}
    size = given.get("out_shard_size")
    if size is not None:
        given["out_shard_size"] = parse_shard_size(size, "--out-shard-size")
    idle = [name for name in given if name in no_effect and given[name] and name != "quiet"]
    if idle:
        words = [f"--{name.replace('_', '-')}" if name != "verbosity" else "-v" for name in idle]
        say(f"note: without effect here: {', '.join(words)}", quiet=bool(given.get("quiet")))
    return given


def merge_given(recipe: Recipe, out: Path, given: dict[str, Any]) -> None:
    """Merges as mergekit's options say."""
    from fastmerge.engine.merge import merge_plan
    from fastmerge.integrations.mergekit import prepared

    quiet = bool(given.get("quiet"))
    plan, arguments = prepared(recipe, out, given)
    title = f"merging to {out.name or out}"
    with interruptible(out), Progress(title, quiet=quiet) as progress:
        report = merge_plan(plan, overwrite=True, progress=progress, **arguments)
    tell(report, quiet=quiet)
