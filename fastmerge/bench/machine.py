"""What a reader needs to judge figures: processor, memory, disk, GPUs, versions."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fastmerge.version import __version__

PACKAGES = ("mergekit", "torch", "numpy", "safetensors")


def machine(folder: Path, peers: Iterable[str] = ()) -> dict[str, str]:
    """Names and values, in words; of the disk that ``folder`` is on, and of the ``peers``' packages
    besides those that every report names.
    """
    from fastmerge.compute.cpu import isa

    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "instruction set": isa(),
        "memory": f"{memory / 2**30:.0f} GiB",
        "load": f"{os.getloadavg()[0]:.1f}",  # of other work, before any of ours
        "file system": file_system(folder),
        "disk": disk(folder),
        "GPU": ", ".join(gpus()) or "none",
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        "fastmerge": __version__,
        **{name: _version(name) for name in dict.fromkeys((*PACKAGES, *peers))},
    }


def file_system(folder: Path) -> str:
    """The type of the file system that ``folder`` is on."""
    best = ("", "unknown")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, escaped, kind = line.split()[:3]
        # A blank is \040 there.
        point = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), escaped)
        inside = f"{folder.resolve()}/".startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best[0]):
            best = (point, kind)
    return best[1]


def disk(folder: Path) -> str:
    """The block device below ``folder`` and its size; "unknown" where the file system has several,
    or none.
    """
    device = folder.stat().st_dev
    place = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    if not place.exists():
        return "unknown"
    real = place.resolve()
    whole = real.parent if (real / "partition").exists() else real
    words = [whole.name]
    model = whole / "device" / "model"
    if model.exists():
        words.append(model.read_text().strip())
    words.append(f"{512 * int((whole / 'size').read_text()) / 1e9:.0f} GB")
    if (whole / "queue" / "rotational").read_text().strip() == "1":
        words.append("rotational")  # as virtual disks often say, whatever they are
    return " ".join(words)


def gpus() -> list[str]:
    """The names of NVIDIA's, by the driver: importing torch for it takes seconds."""
    found = []
    for card in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        lines = card.read_text().splitlines()
        found += [line.split(":", 1)[1].strip() for line in lines if line.startswith("Model:")]
    return found


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
