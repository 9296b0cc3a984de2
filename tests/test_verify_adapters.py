"""`fastmerge verify` of the adapters that fastmerge writes: merged ones and extracted ones."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import fastmerge
from fastmerge.errors import ModelError, UnsupportedError
from fastmerge.models.adapter import CONFIG, WEIGHTS
from fastmerge.models.side_files import LINEAGE_FILE

MODULES = {f"model.layers.{i}.self_attn.{name}_proj": (32, 24) for i in (0, 1) for name in "qv"}


def adapter(folder: Path, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    tensors = {}
    for module, (rows, cols) in MODULES.items():
        head = f"base_model.model.{module}.lora_"
        tensors[f"{head}A.weight"] = rng.normal(size=(4, cols)).astype(np.float32)
        tensors[f"{head}B.weight"] = rng.normal(size=(rows, 4)).astype(np.float32)
    folder.mkdir()
    safetensors.numpy.save_file(tensors, folder / WEIGHTS)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    two = [adapter(root / name, seed) for seed, name in enumerate(("code", "math"))]
    fastmerge.merge_adapters(two, root / "out", weights=[0.5, 1.0], method="cat")
    return root / "out"


@pytest.fixture
def copy(merged: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(merged, tmp_path / "out"))


def places(folder: Path) -> list[tuple[str, str]]:
    return [(found.file, found.tensor) for found in fastmerge.verify(folder).differences]


def test_a_merged_adapter_is_whole(merged: Path) -> None:
    found = fastmerge.verify(merged)
    assert found.whole and not found.unchecked
    assert found.checked == found.tensors == 2 * len(MODULES)
    assert found.files == 4
    with pytest.raises(UnsupportedError, match=r"out: an adapter.*against"):
        fastmerge.verify(merged, {"merge_method": "linear", "models": [{"model": "x"}]})


def test_an_extracted_adapter_is_whole(zoo, tmp_path: Path) -> None:
    base = zoo.base("base", layers=2)
    tuned = zoo.tune(base, "tuned", seed=1)
    fastmerge.extract_lora(tuned, base, tmp_path / "out", rank=3)
    found = fastmerge.verify(tmp_path / "out")
    assert found.whole and not found.unchecked and found.checked == found.tensors > 0
    lineage = json.loads((tmp_path / "out" / LINEAGE_FILE).read_text())
    assert all("error" in told for told in lineage["modules"].values() if "norm" in told)


def test_every_flipped_bit_and_changed_file_is_named(copy: Path) -> None:
    data = bytearray((copy / WEIGHTS).read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    header.pop("__metadata__")
    for entry in header.values():
        data[begin + entry["data_offsets"][1] - 1] ^= 1
    (copy / WEIGHTS).write_bytes(data)
    (copy / CONFIG).write_text(
        (copy / CONFIG).read_text().replace('"lora_alpha": ', '"lora_alpha": 9')
    )
    (copy / "README.md").write_text("# Another\n")
    (copy / "model.safetensors").write_bytes(b"x")
    assert sorted(places(copy)) == sorted(
        [(WEIGHTS, name) for name in header]
        + [(CONFIG, ""), ("README.md", ""), ("model.safetensors", "")]
    )


def test_a_lineage_that_is_gone_or_edited(copy: Path) -> None:
    path = copy / LINEAGE_FILE
    said = json.loads(path.read_text())
    name = min(said["tensors"])
    path.write_text(json.dumps(said | {"tensors": {name: {"checksum": "0" * 32}}}))
    assert (WEIGHTS, name) in places(copy) and len(places(copy)) == 2 * len(MODULES)
    path.write_text(json.dumps(said | {"fastmerge_seed": "9"}))
    assert places(copy) == [(WEIGHTS, "")]
    said["written"].pop("README.md")
    path.write_text(json.dumps(said))
    assert places(copy) == [("README.md", "")]
    old = {k: v for k, v in said.items() if k not in ("written", "checksum", "tensors")}
    path.write_text(json.dumps(old))
    found = fastmerge.verify(copy)
    assert len(found.differences) == 2 and not found.unchecked and not found.checked
    path.unlink()
    with pytest.raises(ModelError, match=f"has no {LINEAGE_FILE}"):
        fastmerge.verify(copy)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_links_out_and_pipes_are_differences(copy: Path, name: str) -> None:
    outside = copy.parent / "secret"
    (copy / name).rename(outside)
    assert (name, "") in places(copy)
    (copy / name).symlink_to(outside)
    assert (name, "") in places(copy)
    (copy / name).unlink()
    os.mkfifo(copy / name)
    assert (name, "") in places(copy)
