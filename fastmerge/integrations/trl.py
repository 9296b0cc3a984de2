"""TRL's `MergeModelCallback`, whose merges block a training run, on fastmerge's engine.

::

    from trl.experimental.merge_model_callback import MergeConfig, MergeModelCallback
    # before trl 0.24: trl.MergeModelCallback, trl.mergekit_utils.MergeConfig

    from fastmerge.integrations import trl

    trl.install()  # until trl.uninstall(); or: with trl.installed(): ...
    trainer = DPOTrainer(..., callbacks=[MergeModelCallback(MergeConfig("ties"))])

The callback calls mergekit's ``run_merge`` with a configuration and options of mergekit's, which
has to be installed for these; the merge itself is `fastmerge.integrations.mergekit.run_merge`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from fastmerge.errors import ResourceError, UnsupportedError
from fastmerge.integrations.mergekit import run_merge
from fastmerge.integrations.replacement import Places, Replacement

__all__ = ["install", "installed", "uninstall"]

_MODULES = ("trl.experimental.merge_model_callback", "trl.mergekit_utils")  # from 0.24 on; before


def _places() -> Places:
    """What holds mergekit's function by name, and ours."""
    import importlib

    refusals: list[ImportError] = []
    for name in _MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            refusals.append(error)
            continue
        if not callable(getattr(module, "run_merge", None)):
            raise UnsupportedError(
                f"{name} has no run_merge of mergekit's; install mergekit, or use trl 0.12 to 1.16"
            )
        return {(module, "run_merge"): run_merge}
    missing = [error.name for error in refusals if error.name]
    needed = next((name for name in missing if name.partition(".")[0] != "trl"), None)
    if needed is not None:  # of what trl imports, mergekit's own needs among them
        raise ResourceError(
            f"trl's merge callback cannot be imported: the module '{needed}' is missing; install "
            "the package that has it (pip install mergekit brings what mergekit needs)"
        )
    said = "; ".join(map(str, refusals))
    raise ResourceError(f"trl cannot be imported ({said}); pip install trl mergekit")


_replacement = Replacement(_places)


def install() -> None:
    """Puts fastmerge's `run_merge` where TRL's callback calls it; again is no error. Raises
    ResourceError where trl is not installed, UnsupportedError where it merges by something else.
    """
    _replacement.install()


def uninstall() -> None:
    """Puts mergekit's own function back; without `install` it does nothing."""
    _replacement.uninstall()


def installed() -> AbstractContextManager[None]:
    """`install` for the time of a ``with``; where it was installed before, it stays so. Returns the
    context manager. Raises ResourceError and UnsupportedError, when it is entered, as `install`
    does.
    """
    return _replacement.installed()
