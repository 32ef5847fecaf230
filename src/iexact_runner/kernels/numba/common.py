"""What the Numba kernels share: how they are compiled and started, the random numbers and the packing.

Shapes: n elements of a map in flat row-major order, b bits a code, C = CHUNK elements that one iteration of a parallel
loop works on, small enough to stay in the first-level cache.

Chunks start at multiples of C, so no two iterations write the same packed byte, and nothing depends on the number of
threads. No kernel allows all of fast math: LLVM then neither fuses a product with a sum nor assumes that there are no
NaNs.
Words are read as their bytes, low byte first: the machine must be little-endian.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from iexact_runner.kernels import reference
from iexact_runner.kernels.reference import MASK32, PHILOX_MULTIPLIERS, PHILOX_ROUNDS, PHILOX_WEYL

Array = npt.NDArray[Any]
# What is compiled has no useful static type: Numba infers its own from each call.
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

# A multiple of 8, so that a chunk ends with a packed byte: 4 KiB of draws and 8 KiB of float32.
CHUNK = 2048

_LOW_WORD, _WORD = np.uint64(MASK32), np.uint64(32)
_MULTIPLIER0, _MULTIPLIER1 = (np.uint64(multiplier) for multiplier in PHILOX_MULTIPLIERS)
_WEYL0, _WEYL1 = (np.uint64(step) for step in PHILOX_WEYL)


def _cache_folder() -> Path | None:
    """Where Numba caches compiled kernels; a read-only installation of a user without a home has no place."""
    try:
        return Path(numba.njit(cache=True)(_cache_folder).stats.cache_path)
    except RuntimeError:
        return None


def _forget_outdated(cache: Path, *sources: Path) -> None:
    """Removes what was compiled before the last change of any of the folders ``sources``.

    Numba itself compares the file of the kernel alone, though its code has functions and constants of others in it.
    """
    files = (file for folder in sources for file in folder.glob("*.py"))
    changed = max((file.stat().st_mtime for file in files), default=0.0)  # of an archive there are none
    for index in cache.glob("*.nbi"):
        with suppress(OSError):  # another process was first
            if index.stat().st_mtime < changed:
                index.unlink()


_FOLDER = _cache_folder()
_CACHE = _FOLDER is not None
if _FOLDER is not None:
    _forget_outdated(_FOLDER, Path(__file__).parent, Path(reference.__file__).parent)
# The numpy error model drops the check for a zero divisor, which would keep loops from being vectorised.
jit: Decorator = partial(numba.njit, cache=_CACHE, error_model="numpy")
parallel: Decorator = partial(numba.njit, cache=_CACHE, error_model="numpy", parallel=True)
# Sums may be taken in any order, which lets LLVM vectorise them: for kernels that have a tolerance.
reordering: Decorator = partial(numba.njit, cache=_CACHE, error_model="numpy", parallel=True, fastmath={"reassoc"})


@contextmanager
def torch_threads() -> Iterator[None]:
    """Lets Numba use as many threads as PyTorch, and puts the settings of both back."""
    threads, previous = torch.get_num_threads(), numba.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    try:
        yield
    finally:
        numba.set_num_threads(previous)
        if torch.get_num_threads() != threads:  # Numba's OpenMP layer, once started, changes it for the process
            torch.set_num_threads(threads)


def flat32(x: Tensor) -> Array:
    """The elements in row-major order as float32 (n,); a view where x is contiguous float32."""
    flat: Array = x.detach().reshape(-1).float().numpy()
    return flat


def keys(seed: int | Tensor) -> tuple[np.uint64, np.uint64]:
    """Philox key of a seed, low word first."""
    value = int(seed)
    return np.uint64(value & MASK32), np.uint64((value >> 32) & MASK32)


@jit
def chunk_bounds(chunk: int, count: int) -> tuple[int, int]:
    """First element of a chunk and the one past its last."""
    start: Any = np.int64(chunk) * CHUNK
    stop = start + CHUNK
    return start, stop if stop < count else count


@jit
def draw16(first: int, count: int, purpose: int, key0: np.uint64, key1: np.uint64) -> Array:
    """r(first), ..., r(first + count - 1) as uint16: ``reference.draw16``, with each word in a 64-bit lane."""
    groups = (first % 8 + count + 7) // 8
    words = np.empty(2 * groups, np.uint64)
    base = np.uint64(first // 8)
    for index in range(groups):
        group = base + np.uint64(index)
        c0, c1, c2, c3 = group & _LOW_WORD, group >> _WORD, np.uint64(purpose), np.uint64(0)
        k0, k1 = key0, key1
        for _ in range(PHILOX_ROUNDS):
            product0, product1 = c0 * _MULTIPLIER0, c2 * _MULTIPLIER1
            c0, c1 = (product1 >> _WORD) ^ c1 ^ k0, product1 & _LOW_WORD
            c2, c3 = (product0 >> _WORD) ^ c3 ^ k1, product0 & _LOW_WORD
            k0, k1 = (k0 + _WEYL0) & _LOW_WORD, (k1 + _WEYL1) & _LOW_WORD
        words[2 * index] = c0 | (c1 << _WORD)
        words[2 * index + 1] = c2 | (c3 << _WORD)
    return words.view(np.uint16)[first % 8 :]


@jit
def pack(codes: Array, bits: int, packed: Array) -> None:
    """Packs codes (C,), zero past the last element, into ``packed``; all codes of a byte move at once."""
    if bits == 1:
        eights = codes.view(np.uint64)
        for index in range(len(packed)):
            eight = eights[index]
            eight |= eight >> np.uint64(7)
            eight |= eight >> np.uint64(14)
            packed[index] = np.uint8((eight | (eight >> np.uint64(28))) & np.uint64(0xFF))
    elif bits == 2:
        fours = codes.view(np.uint32)
        for index in range(len(packed)):
            four = fours[index]
            four |= four >> np.uint32(6)
            packed[index] = np.uint8((four | (four >> np.uint32(12))) & np.uint32(0xFF))
    elif bits == 4:
        pairs = codes.view(np.uint16)
        for index in range(len(packed)):
            pair = np.uint32(pairs[index])
            packed[index] = np.uint8((pair | (pair >> np.uint32(4))) & np.uint32(0xFF))
    else:
        for index in range(len(packed)):
            packed[index] = codes[index]


@jit
def unpack(packed: Array, bits: int, codes: Array) -> None:
    """Inverse of :func:`pack`: fills codes (C,) as far as ``packed`` reaches."""
    if bits == 1:
        eights = codes.view(np.uint64)
        for index in range(len(packed)):
            eight = np.uint64(packed[index])
            eight = (eight | (eight << np.uint64(28))) & np.uint64(0x0000000F0000000F)
            eight = (eight | (eight << np.uint64(14))) & np.uint64(0x0003000300030003)
            eights[index] = (eight | (eight << np.uint64(7))) & np.uint64(0x0101010101010101)
    elif bits == 2:
        fours = codes.view(np.uint32)
        for index in range(len(packed)):
            four = np.uint32(packed[index])
            four |= four << np.uint32(12)
            fours[index] = (four | (four << np.uint32(6))) & np.uint32(0x03030303)
    elif bits == 4:
        pairs = codes.view(np.uint16)
        for index in range(len(packed)):
            pair = np.uint32(packed[index])
            pairs[index] = np.uint16((pair | (pair << np.uint32(4))) & np.uint32(0x0F0F))
    else:
        for index in range(len(packed)):
            codes[index] = packed[index]
