"""Other programs at the same work, each in a process of its own:

    python -m fastmerge.bench.peers mergekit RECIPE OUT
    python -m fastmerge.bench.peers torch RECIPE OUT
    python -m fastmerge.bench.peers peft BASE ADAPTER OUT

prints the seconds of its imports and of its work apart: what it takes to import torch or to load a
model is not counted against it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastmerge.bench.pagecache import files_of
from fastmerge.bench.process import Run, measure

NAMES = ("mergekit", "torch", "peft")
MODULES = {"mergekit": ("mergekit",), "torch": ("torch",), "peft": ("peft", "transformers")}


def run_peer(name: str, *words: Path) -> Run:
    """One run of a peer, without its imports; the last of the words is what it writes."""
    usage = measure(
        [sys.executable, "-m", "fastmerge.bench.peers", name, *words], folder=words[-1].parent
    )
    detail = json.loads(usage.stdout.splitlines()[-1])
    return usage.run.with_seconds(detail["merge"], detail)


def mergekit(recipe: str, out: str) -> Callable[[], Any]:
    """`run_merge`, as mergekit-yaml calls it."""
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    text = Path(recipe).read_text()
    config = MergeConfiguration.model_validate(yaml.safe_load(text))
    options = MergeOptions(quiet=True)
    return lambda: run_merge(config, out_path=out, options=options, config_source=text)


def torch(recipe: str, out: str) -> Callable[[], Any]:
    """A loop over safetensors, as one writes it by hand; tensor by tensor, saved at the end."""
    import yaml
    from safetensors import safe_open
    from safetensors.torch import save_file

    from fastmerge.bench.expressions import WHOLE

    asked = yaml.safe_load(Path(recipe).read_text())
    entries = [entry["model"] for entry in asked["models"]]
    own = [entry.get("parameters", {}) for entry in asked["models"]]
    if asked.get("base_model") not in (None, *entries):
        entries.insert(0, asked["base_model"])
    files = [files_of(Path(entry)) for entry in entries]
    work = WHOLE[asked["merge_method"]]
    weights = [float(values.get("weight", 1.0)) for values in own]
    density = float(own[-1].get("density", 1.0))
    t = float(asked.get("parameters", {}).get("t", 0.0))

    def merge() -> None:
        places: list[dict[str, Any]] = []
        for own_files in files:
            held: dict[str, Any] = {}
            for file in own_files:
                opened: Any = safe_open(file, "pt")
                held |= dict.fromkeys(opened.keys(), opened)
            places.append(held)
        made = {}
        for name in places[0]:
            tensors = [place[name].get_tensor(name) for place in places]
            flat = [tensor.flatten() for tensor in tensors]
            made[name] = work(flat, weights, density, t).reshape(tensors[0].shape)
        Path(out).mkdir()
        save_file(made, f"{out}/model.safetensors", metadata={"format": "pt"})

    return merge


def peft(base: str, adapter: str, out: str) -> Callable[[], Any]:
    """`merge_and_unload` and `save_pretrained`, in the base's own type; loading is not counted
    either.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    model = PeftModel.from_pretrained(model, adapter)
    return lambda: model.merge_and_unload().save_pretrained(out)


def main() -> None:
    name, *words = sys.argv[1:]
    began = time.perf_counter()
    prepare: dict[str, Callable[..., Callable[[], Any]]] = {
        "mergekit": mergekit,
        "torch": torch,
        "peft": peft,
    }
    work = prepare[name](*words)
    imported = time.perf_counter()
    work()
    seconds = {"import": imported - began, "merge": time.perf_counter() - imported}
    sys.stdout.write(json.dumps(seconds) + "\n")


if __name__ == "__main__":
    main()
