"""Signs of which the sketch of a map is not sure, on the CPU, equal to ``reference``.

Shapes: N nodes, D features, R directions; a chunk is K rows, E = K D elements, and an iteration of a parallel loop.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from iexact_runner.kernels.numba.blocks import combine, factors
from iexact_runner.kernels.numba.common import Array, draw16, flat32, jit, keys, pack, parallel, torch_threads
from iexact_runner.kernels.numba.elementwise import dropout_numbers
from iexact_runner.kernels.reference import DROPOUT
from iexact_runner.kernels.reference.signs import ESCAPE, chunk_bytes, chunk_rows, stream_lengths

_ZERO, _WORD = np.float32(0.0), np.uint64(32)
# Threshold of the draws, Philox key, and place of the first element.
Draws = tuple[np.uint16, np.uint64, np.uint64, int]


def _tables() -> tuple[Array, Array, Array]:
    """For bytes s, v: the bits of v where s has ones, moved together; the first bits of v, put there; the ones of s."""
    which, value = np.meshgrid(np.arange(256), np.arange(256), indexing="ij")
    gathered, spread, ones = (
        np.zeros((256, 256), np.int64),
        np.zeros((256, 256), np.int64),
        np.zeros((256, 256), np.int64),
    )
    for bit in range(8):
        marked = which >> bit & 1
        gathered |= (value >> bit & marked) << ones
        spread |= (value >> ones & marked) << bit
        ones += marked
    return gathered.astype(np.uint64), spread.astype(np.uint8), ones[:, 0].astype(np.uint64)


_GATHERED, _SPREAD, _ONES = _tables()


@jit
def _classify(
    coefficients: Array, directions: Array, shift: Array, limit: Array, first: int, drawing: Draws
) -> tuple[Array, Array, Array]:
    """Of z~ = c V^T + shift, a bit an element: whether z~ > 0, whether it is sure, whether dropout keeps it."""
    threshold, key0, key1, offset = drawing
    rows, width = len(coefficients), directions.shape[1]
    count = rows * width
    size = (count + 7) // 8
    z, codes = np.empty((rows, width), np.float32), np.zeros(8 * size, np.uint8)
    positive, sure, kept = np.empty(size, np.uint8), np.empty(size, np.uint8), np.empty(size, np.uint8)
    combine(coefficients, directions, shift, z)
    for row in range(rows):
        for column in range(width):
            codes[row * width + column] = np.uint8(abs(z[row, column]) >= limit[column])
    pack(codes, 1, sure)
    flat = z.reshape(-1)
    for index in range(count):
        codes[index] = np.uint8(flat[index] > _ZERO)
    pack(codes, 1, positive)
    if threshold:
        draws = draw16(offset + first, count, DROPOUT, key0, key1)
        for index in range(count):
            codes[index] = np.uint8(draws[index] >= threshold)
    else:
        codes[:count] = np.uint8(1)
    pack(codes, 1, kept)
    return positive, sure, kept


@jit
def _gather(which: Array, signs: Array, gathered: Array, ones: Array, words: Array) -> Any:
    """Moves the marked bits together into words of 32; how many there are."""
    held, have, place, total = np.uint64(0), np.uint64(0), 0, 0
    for index in range(len(which)):
        held |= gathered[which[index], signs[index]] << have
        have += ones[which[index]]
        if have >= _WORD:
            words[place] = np.uint32(held)
            held >>= _WORD
            have -= _WORD
            place += 1
            total += 32
    if have:
        words[place] = np.uint32(held)
    return total + np.int64(have)


@jit
def _list_gaps(certain: Array, wrong: Array, ones: Array, gaps: Array) -> int:
    """Writes where sure elements are wrong, as far as there is room; how long the list is."""
    number: int = 0
    gap: Any = 0
    for index in range(len(certain)):
        if not wrong[index]:
            gap += np.int64(ones[certain[index]])
            continue
        for bit in range(8):
            if wrong[index] >> bit & 1:
                while gap >= ESCAPE:
                    if number < len(gaps):
                        gaps[number] = ESCAPE
                    number += 1
                    gap -= ESCAPE
                if number < len(gaps):
                    gaps[number] = gap
                number += 1
                gap = 0
            elif certain[index] >> bit & 1:
                gap += 1
    return number


@parallel
def _pack_signs_kernel(
    mask: Array,
    coefficients: Array,
    directions: Array,
    shift: Array,
    limit: Array,
    exact: bool,
    drawing: Draws,
    rows: int,
    gathered: Array,
    ones: Array,
    streams: Array,
    counts: Array,
) -> None:
    """Stream and counts of each chunk: (N D / 8,) -> (chunks, room), (2, chunks)."""
    nodes, width, (chunks, room) = len(coefficients), directions.shape[1], streams.shape
    for chunk in numba.prange(chunks):
        first = np.int64(chunk) * rows
        last = min(first + rows, nodes)
        positive, sure, kept = _classify(coefficients[first:last], directions, shift, limit, first * width, drawing)
        signs = mask[first * width // 8 : (last * width + 7) // 8]
        words = np.zeros(room // 4 + 1, np.uint32)
        bits, number = _gather(kept & ~sure, signs, gathered, ones, words), 0
        stream = streams[chunk]
        stream[:] = 0
        if exact:
            certain = kept & sure
            number = _list_gaps(certain, certain & (positive ^ signs), ones, stream[(bits + 7) // 8 :])
            every: Any = 0
            for index in range(len(kept)):
                every += np.int64(ones[kept[index]])
            if (bits + 7) // 8 + number >= (every + 7) // 8:
                stream[:] = 0
                words[:] = 0
                bits, number = _gather(kept, signs, gathered, ones, words), -1
        _copy(words.view(np.uint8)[: (bits + 7) // 8], stream)
        counts[0, chunk], counts[1, chunk] = bits, number


@parallel
def _join_streams_kernel(streams: Array, begins: Array, lengths: Array, joined: Array) -> None:
    """Copies the first bytes of each stream to its place, as far as there is room."""
    for chunk in numba.prange(len(lengths)):
        for index in range(lengths[chunk]):
            if begins[chunk] + index < len(joined):
                joined[begins[chunk] + index] = streams[chunk, index]


# A function: assigned to in a parallel loop, a view of words of another type is lost.
@jit
def _copy(source: Array, out: Array) -> None:
    """Copies all of ``source`` to the beginning of ``out``."""
    for index in range(len(source)):
        out[index] = source[index]


@jit
def _spread_bits(which: Array, words: Array, spread: Array, ones: Array, signs: Array) -> Any:
    """Puts the bits of words of 32 where marked, in place of those of ``signs``; how many are marked."""
    held, have, place = np.uint64(words[0]), _WORD, 1
    total: Any = 0
    for index in range(len(which)):
        mark = which[index]
        signs[index] = (signs[index] & ~mark) | spread[mark, held & np.uint64(0xFF)]
        held >>= ones[mark]
        have -= ones[mark]
        total += np.int64(ones[mark])
        if have < np.uint64(8):
            if place < len(words):
                held |= np.uint64(words[place]) << have
            have += _WORD
            place += 1
    return total


@jit
def _correct(gaps: Array, certain: Array, ones: Array, signs: Array) -> None:
    """Turns the signs of the sure elements that the list of gaps names."""
    entry, index = 0, 0
    gap: Any = np.int64(0)
    left: Any = np.int64(0)
    # ``gap`` more sure elements are skipped before the next is named; bits below ``left`` are done.
    while entry < len(gaps):
        gap += np.int64(gaps[entry])
        entry += 1
        if gaps[entry - 1] == ESCAPE:
            continue
        while index < len(certain):
            rest = certain[index] >> left << left
            if gap >= np.int64(ones[rest]):
                gap -= np.int64(ones[rest])
                index, left = index + 1, np.int64(0)
                continue
            while not (certain[index] >> left & 1) or gap:
                gap -= certain[index] >> left & 1
                left += 1
            signs[index] ^= np.uint8(1 << left)
            left += 1
            break


@parallel
def _unpack_signs_kernel(
    stream: Array,
    begins: Array,
    counts: Array,
    coefficients: Array,
    directions: Array,
    shift: Array,
    limit: Array,
    exact: bool,
    drawing: Draws,
    rows: int,
    room: int,
    spread: Array,
    ones: Array,
    mask: Array,
    wrong: Array,
) -> None:
    """All signs, and of which chunks the number of bits stored is another: -> (N D / 8,), (chunks,)."""
    nodes, width = len(coefficients), directions.shape[1]
    for chunk in numba.prange(len(begins)):
        first = np.int64(chunk) * rows
        last = min(first + rows, nodes)
        bits, number, begin = np.int64(counts[0, chunk]), np.int64(counts[1, chunk]), begins[chunk]
        positive, sure, kept = _classify(coefficients[first:last], directions, shift, limit, first * width, drawing)
        which = kept if number < 0 else kept & ~sure
        listed = (bits + 7) // 8
        there = begin + listed + max(number, 0) <= len(stream)
        words = np.zeros(room // 4 + 1, np.uint32)
        if there and listed <= room:
            _copy(stream[begin : begin + listed], words.view(np.uint8))
        signs = positive.copy()
        wrong[chunk] = _spread_bits(which, words, spread, ones, signs) != bits
        if not there:
            signs = positive
        elif exact and number > 0:
            _correct(stream[begin + listed : begin + listed + number], kept & sure, ones, signs)
        signs &= kept
        mask[first * width // 8 : (last * width + 7) // 8] = signs


def pack_signs(
    packed_mask: Tensor,
    coefficients: Tensor,
    directions: Tensor,
    shift: Tensor,
    limit: Tensor,
    *,
    exact: bool,
    p: float,
    seed: int | Tensor,
    offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """See :func:`iexact_runner.kernels.reference.pack_signs`."""
    width = directions.size(0)
    chunks = -(-coefficients.size(0) // chunk_rows(width))
    streams = torch.empty(chunks, chunk_bytes(width), dtype=torch.uint8)
    counts = torch.empty(2, chunks, dtype=torch.int32)
    arrays = (packed_mask.numpy(), *factors(coefficients, directions), flat32(shift), flat32(limit))
    with torch_threads():
        _pack_signs_kernel(
            *arrays,
            exact,
            _drawing(p, seed, offset),
            chunk_rows(width),
            _GATHERED,
            _ONES,
            streams.numpy(),
            counts.numpy(),
        )
    return streams, counts


def join_streams(streams: Tensor, counts: Tensor, *, capacity: int) -> Tensor:
    """See :func:`iexact_runner.kernels.reference.join_streams`."""
    lengths = stream_lengths(counts)
    joined = torch.zeros(capacity, dtype=torch.uint8)
    with torch_threads():
        _join_streams_kernel(streams.numpy(), (lengths.cumsum(0) - lengths).numpy(), lengths.numpy(), joined.numpy())
    return joined


def unpack_signs(
    stream: Tensor,
    counts: Tensor,
    coefficients: Tensor,
    directions: Tensor,
    shift: Tensor,
    limit: Tensor,
    *,
    exact: bool,
    p: float,
    seed: int | Tensor,
    offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """See :func:`iexact_runner.kernels.reference.unpack_signs`."""
    lengths, width = stream_lengths(counts), directions.size(0)
    mask = torch.empty(-(-coefficients.size(0) * width // 8), dtype=torch.uint8)
    wrong = torch.zeros(counts.size(1), dtype=torch.int32)
    begins = (lengths.cumsum(0) - lengths).numpy()
    arrays = (*factors(coefficients, directions), flat32(shift), flat32(limit), exact, _drawing(p, seed, offset))
    sizes = (chunk_rows(width), chunk_bytes(width), _SPREAD, _ONES)
    with torch_threads():
        _unpack_signs_kernel(stream.numpy(), begins, counts.numpy(), *arrays, *sizes, mask.numpy(), wrong.numpy())
    return mask, wrong.sum(dtype=torch.int32)


def _drawing(p: float, seed: int | Tensor, offset: int) -> Draws:
    """Threshold of the draws, 0 if none is dropped, Philox key, and place of the first element."""
    return (dropout_numbers(p)[0], *keys(seed), offset)
