"""Signs of which the sketch of a map is not sure, on a GPU, equal to ``reference``.

Shapes: N nodes, D features, R directions; a program works on a chunk of K rows, with D rounded up to a power of two
COLUMNS, in a tile [K, COLUMNS] whose flat order is that of the map. Maps of fewer than 8 or more than 512 features are
left to ``reference``, whose operations run on a GPU too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from iexact_runner.kernels import reference
from iexact_runner.kernels.reference import chunk_bytes, chunk_rows, dropout_threshold, stream_lengths
from iexact_runner.kernels.triton.blocks import _draws, _factors, _mask_bits
from iexact_runner.kernels.triton.common import WARPS, pack, seed_on

NARROWEST, WIDEST = 8, 512
_ESCAPE = tl.constexpr(255)


@triton.jit
def _known(
    c_ptr,
    v_ptr,
    shift_ptr,
    limit_ptr,
    seed_ptr,
    first_group,
    threshold,
    row,
    nodes,
    rank,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Of z~ = c V^T + shift in a tile: whether z~ > 0, is sure, is there and kept; each [ROWS * COLUMNS]."""
    column = tl.arange(0, COLUMNS)[None, :]
    there, within = row < nodes, column < WIDTH
    z = tl.zeros([ROWS, COLUMNS], tl.float32) + tl.load(shift_ptr + column, mask=within, other=0.0)
    if rank is None:  # of the columns themselves
        coefficient = tl.load(c_ptr + row * WIDTH + column, mask=there & within, other=0.0)
        z += coefficient * tl.load(v_ptr + column, mask=within, other=0.0)
    else:
        for direction in range(rank):
            coefficient = tl.load(c_ptr + row * rank + direction, mask=there, other=0.0)
            z += coefficient * tl.load(v_ptr + direction * WIDTH + column, mask=within, other=0.0)
    limit = tl.load(limit_ptr + column, mask=within, other=0.0)
    sure = (z >= limit) | (-z >= limit)
    kept = there & within
    if seed_ptr is not None:
        kept = kept & (_draws(seed_ptr, first_group, row, WIDTH, 0, ROWS, COLUMNS).to(tl.int32) >= threshold)
    size: tl.constexpr = ROWS * COLUMNS
    return tl.reshape(z > 0, [size]), tl.reshape(sure, [size]), tl.reshape(kept, [size])


@triton.jit
def _last_two(last1, before1, last2, before2):
    """Last and last but one position that is marked, of two neighbouring runs together; 0 for none."""
    found = last2 > 0
    last = tl.where(found, last2, last1)
    before = tl.where(found, tl.where(before2 > 0, before2, last1), before1)
    return last, before


@triton.jit(do_not_specialize=["first_group", "threshold", "nodes", "rank"])
def _pack_signs_kernel(
    mask_ptr,
    c_ptr,
    v_ptr,
    shift_ptr,
    limit_ptr,
    seed_ptr,
    words_ptr,
    counts_ptr,
    first_group,
    threshold,
    nodes,
    rank,
    chunks,
    WIDTH: tl.constexpr,
    ROOM: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Stream of a chunk: mask [n / 8] -> words [chunks, ROOM / 4], which are 0 before, and counts [2, chunks]."""
    chunk = tl.program_id(0).to(tl.int64)
    row = chunk * ROWS + tl.arange(0, ROWS)[:, None]
    positive, sure, kept = _known(
        c_ptr, v_ptr, shift_ptr, limit_ptr, seed_ptr, first_group, threshold, row, nodes, rank, WIDTH, ROWS, COLUMNS
    )
    sign = tl.reshape(_mask_bits(mask_ptr, row, row < nodes, WIDTH, ROWS, COLUMNS) != 0, [ROWS * COLUMNS])
    words = words_ptr + chunk * (ROOM // 4)
    stored = (kept & ~sure).to(tl.int32)
    number = 0
    if EXACT:
        certain = kept & sure
        wrong = certain & (positive != sign)
        position = tl.where(wrong, tl.cumsum(certain.to(tl.int32), 0), 0)
        last, before = tl.associative_scan((position, tl.zeros_like(position)), 0, _last_two)
        skipped = last - before - 1
        size = tl.where(wrong, skipped // _ESCAPE + 1, 0)
        end = tl.cumsum(size, 0)
        number = tl.sum(size, 0)
        listed = (tl.sum(stored, 0) + 7) // 8
        raw = listed + number >= (tl.sum(kept.to(tl.int32), 0) + 7) // 8
        stored = tl.where(raw, kept.to(tl.int32), stored)
        for entry in range(tl.where(raw, 0, tl.max(size, 0))):
            place = listed + end - 1 - entry
            byte = tl.where(entry == 0, skipped % _ESCAPE, _ESCAPE)
            tl.atomic_or(words + place // 4, byte << (place % 4 * 8), mask=entry < size)
        number = tl.where(raw, -1, number)
    place = tl.cumsum(stored, 0) - stored
    tl.atomic_or(words + place // 32, sign.to(tl.int32) << (place % 32), mask=(stored != 0) & sign)
    tl.store(counts_ptr + chunk, tl.sum(stored, 0))
    tl.store(counts_ptr + chunks + chunk, number)


@triton.jit(do_not_specialize=["capacity"])
def _join_streams_kernel(
    streams_ptr, begins_ptr, lengths_ptr, joined_ptr, capacity, ROOM: tl.constexpr, PLACES: tl.constexpr
):
    """Copies the first bytes of a stream to its place: streams [chunks, ROOM] -> joined [capacity]."""
    chunk = tl.program_id(0).to(tl.int64)
    begin, length = tl.load(begins_ptr + chunk), tl.load(lengths_ptr + chunk)
    place = tl.arange(0, PLACES)
    copied = (place < length) & (begin + place < capacity)
    byte = tl.load(streams_ptr + chunk * ROOM + place, mask=copied, other=0)
    tl.store(joined_ptr + begin + place, byte, mask=copied)


@triton.jit(do_not_specialize=["first_group", "threshold", "nodes", "rank", "capacity"])
def _unpack_signs_kernel(
    stream_ptr,
    begins_ptr,
    counts_ptr,
    c_ptr,
    v_ptr,
    shift_ptr,
    limit_ptr,
    seed_ptr,
    mask_ptr,
    wrong_ptr,
    first_group,
    threshold,
    nodes,
    rank,
    chunks,
    capacity,
    WIDTH: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Signs of a chunk: stream [capacity] -> words of mask [n / 32], which are 0 before, and wrong [chunks]."""
    chunk = tl.program_id(0).to(tl.int64)
    row = chunk * ROWS + tl.arange(0, ROWS)[:, None]
    sign, sure, kept = _known(
        c_ptr, v_ptr, shift_ptr, limit_ptr, seed_ptr, first_group, threshold, row, nodes, rank, WIDTH, ROWS, COLUMNS
    )
    bits, number = tl.load(counts_ptr + chunk), tl.load(counts_ptr + chunks + chunk)
    begin, listed = tl.load(begins_ptr + chunk), (bits + 7) // 8
    there = begin + listed + tl.maximum(number, 0) <= capacity
    stored = (kept & ~(sure & (number >= 0))).to(tl.int32)
    place = tl.cumsum(stored, 0) - stored
    tl.store(wrong_ptr + chunk, (tl.sum(stored, 0) != bits).to(tl.int32))
    read = (stored != 0) & there & (place < bits)
    byte = tl.load(stream_ptr + begin + place // 8, mask=read, other=0).to(tl.int32)
    sign = tl.where((stored != 0) & there, (byte >> (place % 8)) & 1, sign.to(tl.int32))
    if EXACT:
        certain = kept & sure
        position = tl.cumsum(certain.to(tl.int32), 0)
        reached = 0
        for entry in range(tl.where(there, tl.maximum(number, 0), 0)):
            gap = tl.load(stream_ptr + begin + listed + entry).to(tl.int32)
            reached += tl.where(gap == _ESCAPE, _ESCAPE, gap + 1)
            sign ^= (certain & (position == reached) & (gap < _ESCAPE)).to(tl.int32)
    sign = tl.where(kept, sign, 0)
    if WIDTH % 8 == 0:
        eight = tl.arange(0, COLUMNS // 8)[None, :]
        packed = tl.reshape(pack(tl.reshape(sign, [ROWS * COLUMNS // 8, 8]), 1), [ROWS, COLUMNS // 8])
        inside = (row < nodes) & (eight < WIDTH // 8)
        tl.store(mask_ptr.to(tl.pointer_type(tl.uint8)) + row * (WIDTH // 8) + eight, packed.to(tl.uint8), mask=inside)
    else:
        index = tl.reshape(row * WIDTH + tl.arange(0, COLUMNS)[None, :], [ROWS * COLUMNS])
        tl.atomic_or(mask_ptr + index // 32, sign << (index % 32).to(tl.int32), mask=sign != 0)


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
    """See :func:`reference.pack_signs`."""
    nodes, width = coefficients.size(0), directions.size(0)
    if not NARROWEST <= width <= WIDEST:
        return reference.pack_signs(
            packed_mask, coefficients, directions, shift, limit, exact=exact, p=p, seed=seed, offset=offset
        )
    rows, room, device = chunk_rows(width), chunk_bytes(width), packed_mask.device
    chunks = triton.cdiv(nodes, rows)
    words = torch.zeros(chunks, room // 4, dtype=torch.int32, device=device)
    counts = torch.empty(2, chunks, dtype=torch.int32, device=device)
    if chunks:
        c, v, rank = _factors(coefficients, directions)
        drawing = seed_on(device, seed) if p else None
        sizes = (
            offset // 8,
            dropout_threshold(p),
            nodes,
            rank,
            chunks,
            width,
            room,
            exact,
            rows,
            triton.next_power_of_2(width),
        )
        with torch.cuda.device_of(words):
            _pack_signs_kernel[(chunks,)](
                packed_mask,
                c,
                v,
                shift.float(),
                limit.float(),
                drawing,
                words,
                counts,
                *sizes,
                num_warps=_warps(width),
                enable_fp_fusion=False,
            )
    return words.view(torch.uint8), counts


def join_streams(streams: Tensor, counts: Tensor, *, capacity: int) -> Tensor:
    """See :func:`reference.join_streams`."""
    lengths = stream_lengths(counts)
    joined = torch.zeros(capacity, dtype=torch.uint8, device=streams.device)
    chunks, room = streams.shape
    if chunks and capacity:
        begins = lengths.cumsum(0) - lengths
        with torch.cuda.device_of(joined):
            _join_streams_kernel[(chunks,)](
                streams,
                begins,
                lengths,
                joined,
                capacity,
                room,
                triton.next_power_of_2(room),
                num_warps=1,
                enable_fp_fusion=False,
            )
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
    """See :func:`reference.unpack_signs`."""
    nodes, width = coefficients.size(0), directions.size(0)
    if not NARROWEST <= width <= WIDEST:
        return reference.unpack_signs(
            stream, counts, coefficients, directions, shift, limit, exact=exact, p=p, seed=seed, offset=offset
        )
    device, chunks = stream.device, counts.size(1)
    mask = torch.zeros(triton.cdiv(nodes * width, 32), dtype=torch.int32, device=device)
    wrong = torch.zeros(chunks, dtype=torch.int32, device=device)
    if chunks:
        lengths = stream_lengths(counts)
        c, v, rank = _factors(coefficients, directions)
        drawing = seed_on(device, seed) if p else None
        sizes = (offset // 8, dropout_threshold(p), nodes, rank, chunks, stream.numel(), width, exact)
        with torch.cuda.device_of(mask):
            _unpack_signs_kernel[(chunks,)](
                stream,
                lengths.cumsum(0) - lengths,
                counts.contiguous(),
                c,
                v,
                shift.float(),
                limit.float(),
                drawing,
                mask,
                wrong,
                *sizes,
                chunk_rows(width),
                triton.next_power_of_2(width),
                num_warps=_warps(width),
                enable_fp_fusion=False,
            )
    return mask.view(torch.uint8)[: triton.cdiv(nodes * width, 8)], wrong.sum(dtype=torch.int32)


def _warps(width: int) -> int:
    """8 elements a thread in most tiles, 16 in the widest: with more of them registers spill."""
    return 2 * WARPS if width <= 256 else 4 * WARPS
