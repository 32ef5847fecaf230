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
from iexact_runner.kernels.triton.common import WARPS, seed_on
from iexact_runner.kernels.triton.tiles import combined, factors, load_columns, mask_bytes, passing_bytes

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
    """Bytes of z~ = c V^T + shift in a tile: whether z~ > 0, is sure, is there and kept; int32 [ROWS * COLUMNS / 8]."""
    eight = tl.arange(0, COLUMNS // 8)[None, :]
    zero = tl.zeros([ROWS, COLUMNS // 8, 4], tl.float32)
    left, right = load_columns(shift_ptr, eight, WIDTH)
    left, right = combined(zero + left, zero + right, c_ptr, v_ptr, row, eight, nodes, rank, WIDTH)
    limit_left, limit_right = load_columns(limit_ptr, eight, WIDTH)
    lane = tl.arange(0, 4)[None, None, :]
    both = tl.sum(_flags(left, limit_left) << lane, axis=2)
    both += tl.sum(_flags(right, limit_right) << (4 + lane), axis=2)
    columns = tl.minimum(tl.maximum(WIDTH - 8 * eight, 0), 8)
    kept = tl.where(row < nodes, (1 << columns) - 1, 0)
    if seed_ptr is not None:
        kept = kept & passing_bytes(seed_ptr, first_group, threshold, row, eight, WIDTH, 0)
    size: tl.constexpr = ROWS * COLUMNS // 8
    both = tl.reshape(both, [size])
    return both & 0xFF, both >> 8, tl.reshape(kept, [size])


@triton.jit
def _flags(z, limit):
    """1 where z > 0, and 256 where |z| reaches its limit."""
    return (z > 0).to(tl.int32) + (((z >= limit) | (-z >= limit)).to(tl.int32) << 8)


@triton.jit
def _bytes(bits):
    """Bytes int32 [n / 8] of a tile of n bits, the first one lowest."""
    eights = tl.reshape(bits.to(tl.int32), [bits.numel // 8, 8])
    return tl.sum(eights << tl.arange(0, 8)[None, :], axis=1)


@triton.jit
def _bits(bytes):
    """The inverse of :func:`_bytes`: bits int32 [n] of bytes [n / 8]."""
    return tl.reshape((bytes[:, None] >> tl.arange(0, 8)[None, :]) & 1, [bytes.numel * 8])


@triton.jit
def _count(bytes):
    """How many bits of each byte are set."""
    pairs = bytes - ((bytes >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return (nibbles + (nibbles >> 4)) & 0x0F


@triton.jit
def _gathered(bytes, where):
    """The bits of each byte that are set in ``where``, side by side from the lowest on."""
    gathered, number = tl.zeros_like(bytes), tl.zeros_like(bytes)
    for lane in tl.static_range(8):
        taken = (where >> lane) & 1
        gathered |= ((bytes >> lane) & taken) << number
        number += taken
    return gathered


@triton.jit
def _scattered(bits, where):
    """The inverse of :func:`_gathered`: bits from the lowest on, in the places that are set in ``where``."""
    scattered = tl.zeros_like(where)
    for lane in tl.static_range(8):
        taken = (where >> lane) & 1
        scattered |= (bits & taken) << lane
        bits = bits >> taken
    return scattered


@triton.jit
def _set_bits(words_ptr, place, bits):
    """Sets up to eight bits from each place on in words int32, of which others set other bits."""
    shift = (place % 32).to(tl.int32)
    tl.atomic_or(words_ptr + place // 32, bits << shift, mask=bits != 0)
    beyond = (bits >> 1) >> (31 - shift)  # what does not fit into the word
    tl.atomic_or(words_ptr + place // 32 + 1, beyond, mask=beyond != 0)


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
    eight = tl.arange(0, COLUMNS // 8)[None, :]
    sign = tl.reshape(mask_bytes(mask_ptr, row, eight, nodes, WIDTH), [ROWS * COLUMNS // 8])
    words = words_ptr + chunk * (ROOM // 4)
    stored = kept & ~sure
    number = 0
    if EXACT:
        certain = _bits(kept & sure)
        wrong = (certain != 0) & (_bits(positive ^ sign) != 0)
        position = tl.where(wrong, tl.cumsum(certain, 0), 0)
        last, before = tl.associative_scan((position, tl.zeros_like(position)), 0, _last_two)
        skipped = last - before - 1
        size = tl.where(wrong, skipped // _ESCAPE + 1, 0)
        end = tl.cumsum(size, 0)
        number = tl.sum(size, 0)
        listed = (tl.sum(_count(stored), 0) + 7) // 8
        raw = listed + number >= (tl.sum(_count(kept), 0) + 7) // 8
        stored = tl.where(raw, kept, stored)
        for entry in range(tl.where(raw, 0, tl.max(size, 0))):
            place = listed + end - 1 - entry
            byte = tl.where(entry == 0, skipped % _ESCAPE, _ESCAPE)
            tl.atomic_or(words + place // 4, byte << (place % 4 * 8), mask=entry < size)
        number = tl.where(raw, -1, number)
    size = _count(stored)
    place = tl.cumsum(size, 0) - size
    bits = _gathered(sign, stored)
    _set_bits(words, place, bits)
    tl.store(counts_ptr + chunk, tl.sum(size, 0))
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
    positive, sure, kept = _known(
        c_ptr, v_ptr, shift_ptr, limit_ptr, seed_ptr, first_group, threshold, row, nodes, rank, WIDTH, ROWS, COLUMNS
    )
    bits, number = tl.load(counts_ptr + chunk), tl.load(counts_ptr + chunks + chunk)
    begin, listed = tl.load(begins_ptr + chunk), (bits + 7) // 8
    there = begin + listed + tl.maximum(number, 0) <= capacity
    stored = tl.where(number >= 0, kept & ~sure, kept)
    size = _count(stored)
    place = tl.cumsum(size, 0) - size
    tl.store(wrong_ptr + chunk, (tl.sum(size, 0) != bits).to(tl.int32))
    byte = place // 8
    first = there & (size > 0) & (byte < listed)
    second = there & (place % 8 + size > 8) & (byte + 1 < listed)
    low = tl.load(stream_ptr + begin + byte, mask=first, other=0).to(tl.int32)
    high = tl.load(stream_ptr + begin + byte + 1, mask=second, other=0).to(tl.int32)
    read = _scattered((low | (high << 8)) >> (place % 8), stored)
    sign = tl.where(there, (positive & ~stored) | read, positive)
    if EXACT:
        certain = _bits(kept & sure)
        position = tl.cumsum(certain, 0)
        named = tl.zeros_like(certain)
        reached = 0
        for entry in range(tl.where(there, tl.maximum(number, 0), 0)):
            gap = tl.load(stream_ptr + begin + listed + entry).to(tl.int32)
            reached += tl.where(gap == _ESCAPE, _ESCAPE, gap + 1)
            named ^= tl.where((position == reached) & (gap < _ESCAPE), certain, 0)
        sign ^= _bytes(named)
    sign = sign & kept
    eight = tl.arange(0, COLUMNS // 8)[None, :]
    if WIDTH % 8 == 0:
        packed = tl.reshape(sign, [ROWS, COLUMNS // 8]).to(tl.uint8)
        inside = (row < nodes) & (eight < WIDTH // 8)
        tl.store(mask_ptr.to(tl.pointer_type(tl.uint8)) + row * (WIDTH // 8) + eight, packed, mask=inside)
    else:
        _set_bits(mask_ptr, tl.reshape(row * WIDTH + 8 * eight, [ROWS * COLUMNS // 8]), sign)


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
        c, v, rank = factors(coefficients, directions)
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
                num_warps=2 * WARPS if width <= 256 else 4 * WARPS,  # an eight a thread
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
        c, v, rank = factors(coefficients, directions)
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
                num_warps=2 * WARPS,  # with more of them exact signs of the widest maps spill
                enable_fp_fusion=False,
            )
    return mask.view(torch.uint8)[: triton.cdiv(nodes * width, 8)], wrong.sum(dtype=torch.int32)
