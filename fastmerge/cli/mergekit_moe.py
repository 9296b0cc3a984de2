"""mergekit 0.1.5's ``mergekit-moe``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from fastmerge.cli.app import command
from fastmerge.cli.mergekit import Config, Options, given_options, merge_given
from fastmerge.cli.options import Argument, Option
from fastmerge.errors import RecipeError

_IDLE = frozenset({"load_in_4bit", "load_in_8bit", "unsafe_truncate_embeddings"})


@command
def mergekit_moe(
    config_path: Config,
    out_path: Annotated[Path, Argument(metavar="OUT_PATH", help="Folder to write.")],
    load_in_4bit: Annotated[
        bool, Option(help="No effect: states are those of the weights.")
    ] = False,
    load_in_8bit: Annotated[
        bool, Option(help="No effect: states are those of the weights.")
    ] = False,
    i_understand_this_is_not_useful_without_training: Annotated[
        bool, Option(help="Take experts that are all one model.")
    ] = False,
    **options: Annotated[Any, Options],
) -> None:
    """Do what mergekit-moe does, by its options."""
    from fastmerge.integrations.mergekit import NO_EFFECT
    from fastmerge.recipe.document import Recipe
    from fastmerge.recipe.mixture import Mixture

    switches = {"load_in_4bit": load_in_4bit, "load_in_8bit": load_in_8bit}
    given = given_options({**options, **switches}, NO_EFFECT | _IDLE)
    recipe = Recipe.load(config_path)
    mixture = recipe.output
    if not isinstance(mixture, Mixture):
        raise RecipeError(
            f"{mixture.where}: no mixture of experts: it has no 'experts:'; run `fastmerge "
            "mergekit-yaml`"
        )
    alike = len({expert.source_model for expert in mixture.experts}) == 1
    if alike and not (
        mixture.gate_mode == "random" or i_understand_this_is_not_useful_without_training
    ):
        raise RecipeError(
            f"{mixture.at('experts')}: all experts are one model, which the mixture equals until "
            "it is trained; give --i-understand-this-is-not-useful-without-training, or others"
        )
    merge_given(recipe, out_path, {k: v for k, v in given.items() if k not in _IDLE})
