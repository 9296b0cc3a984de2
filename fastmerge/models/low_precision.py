"""Models stored as codes with scales that fastmerge reads as numbers: fp8 and MXFP4.

What config.json says and what the tensors are must agree; nothing is guessed from either alone.

- ``fp8`` (DeepSeek-V3's format and transformers' FineGrainedFP8): ``X`` and ``X_scale_inv``, one
  for each ``weight_block_size`` or for the tensor. The number is the code *times* it, whatever its
  name says. Others write ``X_scale``, for the tensor or for each row.
- ``compressed-tensors``, where every group's weights are 8-bit floats: ``X`` and ``X_scale``, by
  tensor, channel (row), group or block; of MXFP8 these are powers of two, as bytes (E8M0).
- ``mxfp4`` as gpt-oss has it: ``X_blocks`` (experts, rows, groups, 16) and ``X_scales``, of the
  matrix that transformers' modules hold transposed: ``X`` (experts, 32 groups, rows).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastmerge.codings import Coding
from fastmerge.dtypes import BF16, BY_NAME, DType
from fastmerge.errors import ModelError
from fastmerge.models.quantised import Typed, kind_of, packed_in, sections
from fastmerge.once import cached_property

_FP8 = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}
_SCALES: tuple[str, ...] = ("float32", "bfloat16", "float16", "float8_e8m0fnu")
# Of activations and of the cache: they change nothing in what a weight is.
_STATIC = tuple(
    f"{before}{what}"
    for what in ("input", "activation", "output", "act", "prob", "kv", "k", "q", "v")
    for before in "._"
)
_OF_ACTIVATIONS = re.compile(r"(.*)_(?:scale(?:_inv|_ub)?|zero_point)")
_MX_GROUP = 32
Blocks = list[tuple[str, tuple[int, int] | None]]  # what the config says, and the block it means


class Coded(NamedTuple):
    """One tensor of numbers: where its codes and scales are, and the numbers' shape."""

    codes: str
    scales: str
    coding: Coding
    shape: tuple[int, ...]


@dataclass(frozen=True)
class LowPrecision:
    """``kind``: "fp8", "compressed-tensors" or "mxfp4"; ``section``: what config.json says under
    ``key``. ``tensors``: by the numbers' name. ``static``: scales of activations. ``dtype``: what
    the numbers are written as.
    """

    kind: str
    key: str
    section: Any
    tensors: Mapping[str, Coded]
    static: tuple[str, ...]
    dtype: DType

    @cached_property
    def consumed(self) -> frozenset[str]:
        """The stored tensors that the numbers' take the place of, and scales of activations."""
        both = (name for coded in self.tensors.values() for name in coded[:2])
        return frozenset((*both, *self.static))

    def __str__(self) -> str:
        """For people: the kind, and how its codes have scales."""
        codings = dict.fromkeys(coded.coding for coded in self.tensors.values())
        said = list(dict.fromkeys(str(each).removeprefix(f"{self.kind}, ") for each in codings))
        several = ", ..." if len(said) > 2 else ""
        return f"{self.kind} ({'; '.join(said[:2])}{several})"


def find_low_precision(
    config: Mapping[str, Any], tensors: Mapping[str, Typed], label: str
) -> LowPrecision | None:
    """The format of a model that is in one of these; None for every other, and where no tensor is
    codes. Raises ModelError, which names both, where config and tensors contradict each other.
    """
    key, section = next(sections(config), ("", {}))
    kind = kind_of(section) if isinstance(section, Mapping) else ""
    reader = {"fp8": _fine_grained, "compressed-tensors": _compressed, "mxfp4": _mxfp4}.get(kind)
    if reader is None:
        return None
    try:
        found = reader(section, tensors)
        if not found:
            return None
        static = tuple(name for name in tensors if _is_static(name))
        made = LowPrecision(kind, key, section, found, static, _written(config))
        gone = made.consumed
        rest = {name: tensor for name, tensor in tensors.items() if name not in gone}
        other = packed_in(rest, declared=False)
        if other is not None:
            raise _ContradictionError(f"'{other}' is {rest[other].dtype.name}, with no place in it")
    except _ContradictionError as error:
        raise ModelError(
            f"model '{label}': config.json says {kind} ({key}), and tensor {error}; get the model "
            "again, or its original weights"
        ) from None
    return made


def without_section(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The config without the section at the dotted ``key``."""
    first, _, rest = key.partition(".")
    if not rest:
        return {name: value for name, value in config.items() if name != first}
    return {**config, first: without_section(config[first], rest)}


def with_section(config: Mapping[str, Any], key: str, section: Any) -> dict[str, Any]:
    """The config with what is under the dotted ``key``."""
    first, _, rest = key.partition(".")
    return {
        **config,
        first: with_section(config.get(first, {}), rest, section) if rest else section,
    }


class _ContradictionError(Exception):
    """What a tensor is, where the config says another thing."""


def _written(config: Mapping[str, Any]) -> DType:
    """The type that the config names for what is not codes, else bfloat16."""
    for part in (config, *(p for p in config.values() if isinstance(p, Mapping))):
        for key in ("dtype", "torch_dtype"):
            named = part.get(key)
            found = BY_NAME.get(named.removeprefix("torch.")) if isinstance(named, str) else None
            if found is not None and found.kernels:
                return found
    return BF16


def _is_static(name: str) -> bool:
    found = _OF_ACTIVATIONS.fullmatch(name)
    return found is not None and found[1].endswith(_STATIC)


# ---------------------------------------------------------------- fp8


def _fine_grained(section: Mapping[str, Any], tensors: Mapping[str, Typed]) -> dict[str, Coded]:
    wanted = section.get("fmt", section.get("weight_fmt"))
    blocks = _pair(section.get("weight_block_size"))
    allowed: Blocks = [("weight_block_size", blocks)]
    if blocks is None:
        allowed = [("one scale a tensor", None), ("one scale a row", (1, 0))]  # 0: all columns
    return _scaled(tensors, ("_scale_inv", "_scale"), allowed, wanted)


def _compressed(section: Mapping[str, Any], tensors: Mapping[str, Typed]) -> dict[str, Coded]:
    """Nothing where any group is of another kind than 8-bit floats, or where the weights were
    turned before they were rounded (Hadamard rotations, which the model undoes as it runs).
    """
    turned = section.get("transform_config")
    if turned and (not isinstance(turned, Mapping) or turned.get("config_groups", True)):
        return {}
    groups = section.get("config_groups")
    weights = [
        group.get("weights")
        for group in (groups.values() if isinstance(groups, Mapping) else ())
        if isinstance(group, Mapping)
    ]
    allowed: Blocks = []
    types = _SCALES
    for each in weights:
        if (
            not isinstance(each, Mapping)
            or each.get("num_bits") != 8
            or each.get("type") != "float"
        ):
            return {}
        strategy = each.get("strategy")
        named = f"strategy {strategy}"
        block, group = _pair(each.get("block_structure")), each.get("group_size")
        if strategy == "tensor":
            allowed.append((named, None))
        elif strategy == "channel":
            allowed.append((named, (1, 0)))
        elif strategy == "block" and block:
            allowed.append((f"{named} {list(block)}", block))
        elif strategy == "group" and isinstance(group, int) and group > 0:
            allowed.append((f"{named} of {group}", (1, group)))
        else:
            return {}
        if str(each.get("scale_dtype")).removeprefix("torch.") == "uint8":
            types = (*_SCALES, "uint8")
    return _scaled(tensors, ("_scale",), allowed, None, types) if allowed else {}


def _pair(value: Any) -> tuple[int, int] | None:
    whole = isinstance(value, list) and all(type(v) is int and v > 0 for v in value)
    return (value[0], value[1]) if whole and len(value) == 2 else None


def _scaled(
    tensors: Mapping[str, Typed],
    endings: tuple[str, ...],
    allowed: Blocks,
    fmt: Any,
    types: tuple[str, ...] = _SCALES,
) -> dict[str, Coded]:
    """Every tensor of 8-bit floats with its scales, which lie as one of ``allowed`` says."""
    found: dict[str, Coded] = {}
    scales: set[str] = set()
    known: dict[Any, Coding] = {}
    for name, tensor in tensors.items():
        code = _FP8.get(tensor.dtype.name)
        if code is None or name.endswith("_zero_point"):  # that has no place, or is static
            continue
        if isinstance(fmt, str) and fmt in _FP8.values() and fmt != code:
            raise _ContradictionError(f"'{name}' is {tensor.dtype.name}, where fmt says {fmt}")
        for end in endings:
            scale = name + end
            if scale in tensors:
                break
        else:
            either = " or ".join(f"'{name}{end}'" for end in endings)
            raise _ContradictionError(
                f"'{name}' is {tensor.dtype.name} without its scales, {either}"
            )
        beside = tensors[scale]
        kind = (code, tensor.shape, beside.dtype.code, beside.shape)
        coding = known.get(kind)  # of 45 000 tensors most are of a few kinds
        if coding is None:
            coding = known[kind] = _coding(code, name, tensor.shape, scale, beside, allowed, types)
        scales.add(scale)
        found[name] = Coded(name, scale, coding, tensor.shape)
    for name in tensors if found else ():
        if not name.endswith(endings) or name in scales or _is_static(name):
            continue
        of = next(name.removesuffix(end) for end in endings if name.endswith(end))
        if of in tensors:
            raise _ContradictionError(f"'{of}' is {tensors[of].dtype.name} beside scales, '{name}'")
        if name.endswith(("_scale_inv", "weight_scale")):  # not logit_scale and such
            raise _ContradictionError(f"'{name}' has no codes beside it, '{of}'")
    return found


def _coding(
    code: str,
    name: str,
    shape: tuple[int, ...],
    scale: str,
    scales: Typed,
    allowed: Blocks,
    types: tuple[str, ...],
) -> Coding:
    if scales.dtype.name not in types:
        raise _ContradictionError(
            f"'{scale}' is {scales.dtype.name}; scales are {', '.join(types)}"
        )
    cols = max(1, *shape[-1:])
    for _, block in allowed:
        sized = block and (block[0], block[1] or cols)
        coding = Coding(code, sized)
        if scales.shape in _grids(coding, shape):
            return coding
    said = " or ".join(
        f"{named}: {list(_grids(Coding(code, b and (b[0], b[1] or cols)), shape)[0])}"
        for named, b in allowed
    )
    raise _ContradictionError(
        f"'{scale}' is {list(scales.shape)} for '{name}' of {list(shape)}, where it says {said}"
    )


def _grids(coding: Coding, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shapes that scales of a tensor of this shape may have, the usual one first."""
    if coding.block is None:
        return [(), (1,), (1,) * len(shape)]
    rows, cols = (1, 1, *shape)[-2:]
    grid = (*shape[:-2], *coding.grid(rows, cols))
    return [grid, grid[:-1]] if grid[-1] == 1 else [grid]


# ---------------------------------------------------------------- mxfp4


def _mxfp4(_section: Mapping[str, Any], tensors: Mapping[str, Typed]) -> dict[str, Coded]:
    found: dict[str, Coded] = {}
    for name, tensor in tensors.items():
        if tensor.dtype.name in _FP8:
            raise _ContradictionError(f"'{name}' is {tensor.dtype.name}")
        if not name.endswith("_blocks"):
            continue
        of = name.removesuffix("_blocks")
        scale = f"{of}_scales"
        if tensor.dtype.name != "uint8":
            raise _ContradictionError(f"'{name}' is {tensor.dtype.name}; blocks are uint8")
        if scale not in tensors:
            raise _ContradictionError(f"'{name}' lacks its scales, '{scale}'")
        shape, scales = tensor.shape, tensors[scale]
        if scales.dtype.name not in ("uint8", "float8_e8m0fnu"):
            raise _ContradictionError(f"'{scale}' is {scales.dtype.name}; scales are uint8 (E8M0)")
        if len(shape) < 3 or shape[-1] != _MX_GROUP // 2 or scales.shape != shape[:-1]:
            raise _ContradictionError(
                f"'{name}' is {list(shape)} and '{scale}' {list(scales.shape)}; blocks are "
                f"[..., rows, groups, {_MX_GROUP // 2}], and each has a scale"
            )
        *lead, rows, groups, _ = shape
        coding = Coding("mxfp4", (_MX_GROUP, 1))
        found[of] = Coded(name, scale, coding, (*lead, groups * _MX_GROUP, rows))
    lost = next((n for n in tensors if n.endswith("_scales") and n[:-7] not in found), None)
    if found and lost is not None:
        raise _ContradictionError(f"'{lost}' has no codes beside it, '{lost[:-7]}_blocks'")
    return found
