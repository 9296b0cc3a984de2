"""The ceilings of the first CUDA device: ``python -m fastmerge.bench.device REPEAT`` prints one
JSON object. A process of its own: torch takes seconds to start, and memory.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

_BUFFER = 1 << 29


def main() -> None:
    import torch

    if not torch.cuda.is_available():
        sys.stdout.write(json.dumps({"absent": "torch finds no usable CUDA device"}))
        return
    repeat = int(sys.argv[1])
    on_device = [torch.zeros(_BUFFER, dtype=torch.uint8, device="cuda") for _ in range(2)]
    pinned = torch.zeros(_BUFFER, dtype=torch.uint8, pin_memory=True)

    def seconds(work: Callable[[], Any]) -> list[float]:
        """By the device's own clock."""
        work()
        found = []
        for _ in range(max(repeat, 5)):
            event: Any = torch.cuda.Event  # has no types
            began, ended = (event(enable_timing=True) for _ in range(2))
            began.record()
            work()
            ended.record()
            ended.synchronize()
            found.append(began.elapsed_time(ended) / 1e3)
        return found

    there, here = on_device
    works = {
        "device copy": (2 * _BUFFER, lambda: here.copy_(there)),
        "pinned copy to the device": (_BUFFER, lambda: there.copy_(pinned, non_blocking=True)),
        "pinned copy from the device": (_BUFFER, lambda: pinned.copy_(there, non_blocking=True)),
    }
    found = {
        "device": f"{torch.cuda.get_device_name(0)}, {_BUFFER >> 20} MiB",
        "bytes": {name: nbytes for name, (nbytes, _) in works.items()},
        **{name: seconds(work) for name, (_, work) in works.items()},
    }
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
