"""A Ray cluster: how it is reached, and what its nodes must have in common with who asks them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from fastmerge.errors import FastmergeError, ResourceError, first_sentences
from fastmerge.extras import install
from fastmerge.version import __version__

RETRIES = 3  # of what was at work on a node or in a process that is lost


@dataclass(frozen=True)
class Started:
    """Where a command was started; a worker of the cluster enters it before it does anything."""

    version: str = __version__
    folder: str = field(default_factory=os.getcwd)
    variables: Mapping[str, str] = field(
        default_factory=lambda: {k: v for k, v in os.environ.items() if k.startswith("FASTMERGE_")}
    )

    def enter(self) -> None:
        """Raises FastmergeError where this node has another fastmerge. Relative paths mean what
        they mean there, on nodes that have its folder.
        """
        if self.version != __version__:
            raise FastmergeError(
                f"cluster: fastmerge {__version__} on {os.uname().nodename}, and {self.version} "
                "where the command was started; install the same on all nodes"
            )
        if os.path.isdir(self.folder):
            os.chdir(self.folder)
        os.environ.update(self.variables)


def require() -> None:
    """Raises ResourceError where Ray is not installed."""
    if find_spec("ray") is None:
        raise ResourceError(f"a cluster is reached by Ray; run: {install('ray')}")


def connected(cluster: str) -> Any:
    """Ray, connected to ``cluster``: "auto" (the one that is here, else one of this machine alone),
    "local" (always the latter) or an address. Raises FastmergeError.
    """
    require()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if "@" in cluster:
        raise FastmergeError(
            "cluster: an address with a name or a password in it would be shown; write "
            "ray://HOST:PORT"
        )
    if not ray.is_initialized():
        address = None if cluster == "auto" else cluster
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # of a node that did not start in time Ray raises a bare one
            said = first_sentences(str(error))
            raise ResourceError(f"cluster: {cluster} cannot be reached ({said})") from error
    return ray


def refusal_of(error: Any) -> FastmergeError | None:
    """What a task's error (a RayTaskError) says in one line; None for one that is a fault here."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, FastmergeError):
        return cause
    if "failed to import on the worker" in str(cause or error):
        return ResourceError(
            "cluster: a node cannot load what it was sent; install the same fastmerge, and what "
            "your own functions import, on all nodes"
        )
    return None


def nodes_of(ray: Any, cluster: str) -> list[Mapping[str, float]]:
    """What each node with a CPU has, by the resource's name. Raises ResourceError for none."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    found = [resources for resources in alive if resources.get("CPU")]
    if not found:
        raise ResourceError(f"cluster: {cluster} has no node with a CPU; start one")
    return found
