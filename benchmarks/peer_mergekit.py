"""mergekit 0.1.5 as a child process: peer_mergekit.py RECIPE OUT prints its import and its merge
time apart."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

began = time.perf_counter()
import yaml  # noqa: E402
from mergekit.config import MergeConfiguration  # noqa: E402
from mergekit.merge import run_merge  # noqa: E402
from mergekit.options import MergeOptions  # noqa: E402

imported = time.perf_counter()
text = Path(sys.argv[1]).read_text()
run_merge(
    MergeConfiguration.model_validate(yaml.safe_load(text)),
    out_path=sys.argv[2],
    options=MergeOptions(quiet=True),
    config_source=text,
)
print(json.dumps({"import": imported - began, "merge": time.perf_counter() - imported}))
