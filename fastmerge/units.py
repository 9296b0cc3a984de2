"""Sizes and times in words: '512MiB' to bytes and back."""

from __future__ import annotations

import re

from fastmerge.errors import FastmergeError

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGT", start=1)},
    **{f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", start=1)},
}

_MERGEKIT = {"K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
_LEAST_SHARD_BYTES = 10**6


def parse_size(text: str, where: str = "size") -> int:
    """Bytes in '512MiB' (2**20), '5GB' (10**9) or a plain count; raises FastmergeError naming
    ``where``.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None:
        raise FastmergeError(
            f"{where}: '{text}' is not a size; write it like 512MiB: a number with B, KB, MB, "
            "GB or TB (powers of 1000), or KiB, MiB, GiB or TiB (powers of 1024)"
        )
    size = _whole(float(found[1]) * unit, text, where)
    if size <= 0:
        raise FastmergeError(f"{where}: '{text}' must be more than 0 bytes")
    return size


def _whole(size: float, text: str, where: str) -> int:
    if size >= 2**63:  # infinity too, which 400 digits make
        raise FastmergeError(f"{where}: '{text}' is more bytes than any file can have")
    return int(size)


def parse_shard_size(text: str, where: str) -> int:
    """`parse_size`, and mergekit's way of writing it, where 5B is five billion; at least 1 MB."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMBGT]?)\s*", text, re.IGNORECASE)
    unit = found[2].upper() if found else ""
    if found and unit:
        size = _whole(float(found[1]) * _MERGEKIT[unit], text, where)
    else:
        size = parse_size(text, where)
    if size >= _LEAST_SHARD_BYTES:
        return size
    number = (re.match(r"\s*([0-9.]+)", text) or [text])[0].strip()
    likely = f"{number}GB" if float(number) > 0 else "5GB"
    raise FastmergeError(
        f"{where}: '{text}' is {size} bytes, less than the 1 MB that a file takes at least; "
        f"did you mean {likely}?"
    )


def format_bytes(count: float) -> str:
    """``count`` bytes with three figures and a decimal unit: '2.20 GB', the unit of GB/s."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} B" if unit == "B" else f"{_three_figures(count)} {unit}"
        count /= 1000
    return f"{_three_figures(count)} TB"


def _three_figures(value: float) -> str:
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


def format_count(count: int) -> str:
    """A parameter count as people say it: '1.10 B', '596 M', '12345'."""
    for unit, scale in (("B", 10**9), ("M", 10**6)):
        if count >= scale:
            return f"{_three_figures(count / scale)} {unit}"
    return str(count)


def format_seconds(seconds: float) -> str:
    """'0.8 s', '42 s', '3:05' or '1:02:30'."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
