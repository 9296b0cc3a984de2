"""What a written folder is checked against: a checksum of each tensor, a digest of each file.

A tensor's checksum is BLAKE2b (RFC 7693), 128 bits as 32 hex digits, of its bytes' number (8 bytes,
little endian) and its blocks' sums (8 bytes each, little endian) in order; csrc/primitives/
checksum.h says what a block's sum is, `fastmerge.compute.reference.checksum` is all of it in NumPy.
The sums cost 2 to 4 % of a merge's CPU time; a cryptographic hash of every byte many times that.
They find what disks, copies and downloads do to bytes; whoever can rewrite a folder can rewrite
its checksums too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from fastmerge import _C

ALGORITHM = "blocksum-blake2b-1"
_PIECE_BYTES = 1 << 20
Written = dict[str, dict[str, Any]]  # by file: its bytes, and the sha256 of all or of its header


def sha256_of(file: BinaryIO) -> str:
    """The digest of a file's rest, in hex."""
    digest = hashlib.sha256()
    while piece := file.read(_PIECE_BYTES):
        digest.update(piece)
    return digest.hexdigest()


def checksum_of(sums: _C.Checksum) -> str:
    """The checksum of a tensor of which every byte was added."""
    found = hashlib.blake2b(sums.nbytes.to_bytes(8, "little"), digest_size=16)
    found.update(sums.sums().tobytes())
    return found.hexdigest()


def checksum_of_view(pool: _C.Pool, tensor: _C.View) -> str:
    """The checksum of a tensor's memory."""
    sums = _C.Checksum(tensor.nbytes)
    sums.add_all(pool, tensor)
    return checksum_of(sums)


def checksums_in_file(
    pool: _C.Pool, path: Path, places: Mapping[str, tuple[int, int]]
) -> Iterator[tuple[str, str | None]]:
    """The checksums of tensors in a file, by name; ``places``: each one's first byte and its bytes.
    None for one of whose pages the disk, or the end of a file that was cut, gave none. Raises
    OSError.
    """
    mapping = _C.Mapping(str(path))
    for name, (begin, nbytes) in places.items():
        if begin + nbytes > mapping.size:
            yield name, None
            continue
        mapping.prefetch(begin, nbytes)
        checksum = checksum_of_view(pool, mapping.view(begin, nbytes, "RAW"))
        mapping.drop(begin, nbytes)
        yield name, None if mapping.torn else checksum
