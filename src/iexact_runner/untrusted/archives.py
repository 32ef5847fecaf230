"""Sizes and headers of archives and arrays, read before anything of their size is allocated."""

from __future__ import annotations

import ast
import gzip
import math
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

# What a file may grow to however small it is, and how much it may grow beyond that: real matrices grow 10 to 20 times.
FREE_BYTES = 256 * 2**20
MAX_GROWTH = 100
_CHUNK = 1 << 20
_MAX_HEADER = 10_000

Array = npt.NDArray[Any]


def check_zip(path: Path) -> None:
    """Refuses an archive that would unpack to more than its size can mean, or that has a wrong checksum."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        names = {member.filename for member in members}
        if len(names) < len(members):
            raise ValueError("two members have the same name")
        _check_growth(sum(member.file_size for member in members), path)
        # zipfile stops at the size that the directory states.
        broken = archive.testzip()
    if broken is not None:
        raise ValueError(f"bad checksum of {broken}")


def check_gzip(path: Path) -> None:
    """Reads a compressed file to its end, or to where it has grown too much."""
    size = 0
    with gzip.open(path) as stream:
        while chunk := stream.read(_CHUNK):
            size += len(chunk)
            _check_growth(size, path)


def check_npy(path: Path) -> None:
    """Refuses an array of objects, and one whose header does not fit the file's size."""
    with path.open("rb") as file:
        _check_array(file, path.stat().st_size)


def check_npz(path: Path) -> None:
    """Checks every array of an archive, and every sparse matrix that ``data``, ``indices`` and ``indptr`` make up."""
    check_zip(path)
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(member) as file:
                try:
                    _check_array(file, member.file_size)
                except ValueError as error:
                    raise ValueError(f"{member.filename}: {error}") from error
    with np.load(path, allow_pickle=False) as arrays:
        for name in arrays.files:
            if name.endswith("indptr"):
                prefix = name.removesuffix("indptr")
                # An adjacency is never made dense; attributes are.
                check_csr({part: arrays[prefix + part] for part in _CSR_PARTS}, dense=prefix == "attr_")


_CSR_PARTS = ("data", "indices", "indptr", "shape")


def check_csr(parts: Mapping[str, Array], *, dense: bool) -> None:
    """Refuses a CSR matrix whose parts contradict each other: SciPy's products do not look before they write.

    Args:
        parts: ``data`` (E,), ``indices`` (E,), ``indptr`` (rows + 1,) and ``shape`` (2,).
        dense: whether it is going to be made dense.
    """
    data, indices, indptr, shape = (parts[name] for name in _CSR_PARTS)
    if any(array.ndim != 1 for array in (data, indices, indptr)) or shape.shape != (2,):
        raise ValueError("a sparse matrix has parts of wrong dimensions")
    if any(array.dtype.kind not in "iu" for array in (indices, indptr, shape)) or data.dtype.kind not in "biuf":
        raise ValueError("a sparse matrix has parts of wrong types")
    rows, columns = int(shape[0]), int(shape[1])
    fits = len(indptr) == rows + 1 and len(data) == len(indices) == indptr[-1] and indptr[0] == 0
    if not fits or (np.diff(indptr.astype(np.int64)) < 0).any():
        raise ValueError("the offsets of a sparse matrix are not those of its entries")
    if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < columns:
        entry = np.flatnonzero((indices < 0) | (indices >= columns))[0]
        row = int(np.searchsorted(indptr, entry, side="right")) - 1
        raise ValueError(f"row {row} of a sparse matrix names column {int(indices[entry])}: must be 0 to {columns - 1}")
    if dense:
        check_memory(rows * columns * data.dtype.itemsize)


def check_memory(size: int) -> None:
    """Refuses to make something of more bytes than the machine has."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**40
    if size > memory:
        raise ValueError(f"would take {size / 2**30:,.0f} GiB, and this machine has {memory / 2**30:,.0f}")


def _check_growth(size: int, path: Path) -> None:
    check_memory(size)
    packed = path.stat().st_size
    if size > max(FREE_BYTES, MAX_GROWTH * packed):
        raise ValueError(f"{packed:,} bytes unpack to {size:,} or more")


def _check_array(file: IO[bytes], size: int) -> None:
    """Refuses an array file of ``size`` bytes unless its header says exactly so many."""
    magic = file.read(8)
    if magic[:6] != b"\x93NUMPY" or magic[6] not in (1, 2, 3):
        raise ValueError("is not a numpy array")
    width = 2 if magic[6] == 1 else 4
    length = int.from_bytes(file.read(width), "little")
    if length > _MAX_HEADER:
        raise ValueError(f"has a header of {length:,} bytes")
    dtype, shape = _header(file.read(length))
    count = math.prod(shape)
    expected = len(magic) + width + length + count * dtype.itemsize
    if expected != size:
        raise ValueError(f"says {expected:,} bytes and has {size:,}")


def _header(text: bytes) -> tuple[np.dtype[Any], tuple[int, ...]]:
    try:
        header = ast.literal_eval(text.decode("latin1").strip())
        shape, description = header["shape"], header["descr"]
        dtype = np.dtype(description)
    except (ValueError, SyntaxError, TypeError, LookupError, MemoryError, RecursionError) as error:
        raise ValueError("has a header that cannot be read") from error
    if dtype.hasobject:
        raise ValueError("holds Python objects, which are a pickle")
    if not isinstance(shape, tuple) or not all(isinstance(extent, int) and extent >= 0 for extent in shape):
        raise ValueError("has a shape that is none")
    return dtype, shape
