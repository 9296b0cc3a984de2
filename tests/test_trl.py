"""TRL's merge callback on fastmerge's engine."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from fastmerge.integrations import trl as ours

pytest.importorskip("trl")
callback = pytest.importorskip("trl.experimental.merge_model_callback")


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("method", ["linear", "slerp", "ties"])
def test_a_checkpoint_is_merged_as_by_mergekit(zoo, tmp_path, method):
    target = zoo.base()
    made = {}
    for run in ("ours", "theirs"):
        config = callback.MergeConfig(method)
        config.target_model_path = str(target)
        policy = zoo.tune(target, f"{run}/checkpoint-3")
        merging = callback.MergeModelCallback(config, merge_at_every_checkpoint=True)
        arguments = (
            SimpleNamespace(output_dir=str(tmp_path / run)),
            SimpleNamespace(global_step=3),
        )
        if run == "ours":
            with ours.installed():
                merging.on_save(*arguments, None)
            assert (policy / "merged" / "fastmerge.json").exists()
        else:
            merging.on_save(*arguments, None)
            assert not (policy / "merged" / "fastmerge.json").exists()
        made[run] = zoo.read(policy / "merged")
    assert made["ours"].keys() == made["theirs"].keys()
    for name, value in made["theirs"].items():
        np.testing.assert_allclose(
            made["ours"][name].astype(float), value.astype(float), rtol=2e-3, atol=1e-4
        )


def test_mergekit_s_function_comes_back():
    before = callback.run_merge
    ours.install()
    ours.install()
    assert callback.run_merge is not before
    ours.uninstall()
    ours.uninstall()
    assert callback.run_merge is before
