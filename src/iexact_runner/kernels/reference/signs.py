"""Signs of a map, of which its sketch knows most: only those are stored of which it is not sure. In plain PyTorch.

Shapes: N nodes, D features, R directions; a chunk is K rows, E = K D elements, and has a stream of bytes of its own.

For z~ = c V^T + shift, in one order of sums, an element is *sure* if |z~| >= limit of its column: its sign is that of
z~. Of the others the true bit is stored, in row-major order, the first in the lowest bit. What dropout drops has no
sign. With ``exact``, the sure elements whose sign is not that of z~ follow as a list of gaps: a byte g < 255 skips g
sure elements and names the next one, 255 skips 255 of them and names none. Where that takes no fewer
bytes than all bits, all of them are stored, and the number of gaps is -1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from iexact_runner.kernels.reference.blocks import combine
from iexact_runner.kernels.reference.common import pack, unpack
from iexact_runner.kernels.reference.elementwise import keep_mask

CHUNK_ELEMENTS = 2048
ESCAPE = 255
# Chunks whose z~ is formed at once: never a whole map.
CHUNKS_AT_ONCE = 256


def chunk_rows(width: int) -> int:
    """K, a power of two of 8 or more: with D rounded up to a power of two, a chunk has 2048 elements or 8 rows."""
    return max(8, CHUNK_ELEMENTS // (1 << max(0, width - 1).bit_length()))


def chunk_bytes(width: int) -> int:
    """Room for the stream of a chunk in whole words of 4 bytes."""
    return -(-chunk_rows(width) * width // 32) * 4


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
    """The stream of each chunk, and how long it is.

    Args:
        packed_mask: all signs, 1 bit an element, uint8.
        coefficients: c (N, R) float32.
        directions: V (D, R).
        shift: (D,).
        limit: (D,), from which on z~ is sure.
        exact: list the errors of the sure elements.
        p: rate of the dropout that follows.
        seed: of its mask.
        offset: flat index of the first element in the map that these rows are a run of, a multiple of 8.

    Returns:
        Streams uint8 (chunks, room), and int32 (2, chunks): bits stored, gaps.
    """
    nodes, width = coefficients.size(0), directions.size(0)
    rows = chunk_rows(width)
    chunks, room = -(-nodes // rows), chunk_bytes(width)
    streams = torch.zeros(chunks, room, dtype=torch.uint8, device=packed_mask.device)
    counts = torch.zeros(2, chunks, dtype=torch.int32, device=packed_mask.device)
    for first in range(0, chunks, CHUNKS_AT_ONCE):
        part = slice(first * rows, min((first + CHUNKS_AT_ONCE) * rows, nodes))
        guess, sure, kept = _guesses(coefficients[part], directions, shift, limit, part.start, p, seed, offset)
        bits = unpack(packed_mask[part.start * width // 8 :], (part.stop - part.start) * width, 1)
        signs = F.pad(bits, (0, guess.numel() - bits.numel())).view(guess.shape).bool()
        stored = kept & ~sure
        if exact:
            gaps, number = _gaps(kept & sure & (signs != guess), kept & sure, room)
            raw = (-(-stored.sum(1) // 8) + number) >= -(-kept.sum(1) // 8)
            stored = torch.where(raw[:, None], kept, stored)
            number = torch.where(raw, -1, number)
        else:
            gaps, number = None, torch.zeros(len(guess), dtype=torch.int64, device=guess.device)
        count = stored.sum(1)
        ordered = torch.zeros(len(guess), 8 * room + 1, dtype=torch.uint8, device=guess.device)
        place = torch.where(stored, stored.cumsum(1) - 1, 8 * room)
        ordered.scatter_(1, place, signs.byte())
        stream = pack(ordered[:, :-1].flatten(), 1).view(len(guess), room)
        if gaps is not None:
            behind = torch.arange(room, device=guess.device) - (-(-count // 8))[:, None]
            listed = (behind >= 0) & (behind < number[:, None])
            stream = torch.where(listed, gaps.gather(1, behind.clamp(0, room - 1)), stream)
        streams[first : first + len(guess)] = stream
        counts[0, first : first + len(guess)], counts[1, first : first + len(guess)] = count.int(), number.int()
    return streams, counts


def stream_lengths(counts: Tensor) -> Tensor:
    """Bytes of each chunk's stream, int64 (chunks,)."""
    return -(-counts[0].long() // 8) + counts[1].long().clamp_min(0)


def join_streams(streams: Tensor, counts: Tensor, *, capacity: int) -> Tensor:
    """The streams of all chunks one behind the other, uint8 (capacity,); what does not fit is cut off."""
    length = stream_lengths(counts)
    joined = streams[torch.arange(streams.size(1), device=streams.device) < length[:, None]][:capacity]
    return F.pad(joined, (0, capacity - joined.numel()))


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
    """All signs, 1 bit an element, 0 where dropout drops; and of how many chunks the bits stored are not those found.

    A chunk whose stream does not lie within ``stream`` takes all of its signs from z~.
    """
    nodes, width = coefficients.size(0), directions.size(0)
    rows, room = chunk_rows(width), chunk_bytes(width)
    device = stream.device
    length = stream_lengths(counts)
    begin = length.cumsum(0) - length
    masks, wrong = [], torch.zeros((), dtype=torch.int32, device=device)
    source = F.pad(stream, (0, room))
    for first in range(0, counts.size(1), CHUNKS_AT_ONCE):
        part = slice(first * rows, min((first + CHUNKS_AT_ONCE) * rows, nodes))
        guess, sure, kept = _guesses(coefficients[part], directions, shift, limit, part.start, p, seed, offset)
        some = slice(first, first + len(guess))
        count, number = counts[0, some].long(), counts[1, some].long()
        there = begin[some] + length[some] <= stream.numel()
        stored = torch.where((number < 0)[:, None], kept, kept & ~sure)
        wrong += (stored.sum(1) != count).sum()
        at = begin[some, None] + torch.arange(room, device=device)
        own = source[at.clamp(max=source.numel() - 1)]
        bits = unpack(own.flatten(), own.numel() * 8, 1).view(len(guess), -1).bool()
        read = bits.gather(1, (stored.cumsum(1) - 1).clamp_(0, 8 * room - 1))
        signs = torch.where(stored & there[:, None], read, guess)
        if exact:
            bytes_before = -(-count // 8)
            place = (bytes_before[:, None] + torch.arange(room, device=device)).clamp_(max=room - 1)
            inside = (torch.arange(room, device=device) < number[:, None]) & there[:, None]
            gap = torch.where(inside, own.gather(1, place).long(), ESCAPE)
            reached = torch.where(gap == ESCAPE, gap * inside, gap + 1).cumsum(1)
            named = torch.zeros(len(guess), guess.size(1) + 1, dtype=torch.bool, device=device)
            named.scatter_(1, torch.where(gap < ESCAPE, reached.clamp(max=guess.size(1)), 0), True)
            named[:, 0] = False
            certain = kept & sure
            signs = signs ^ (named.gather(1, torch.where(certain, certain.cumsum(1), 0)) & certain)
        masks.append((signs & kept).flatten()[: (part.stop - part.start) * width])
    flat = torch.cat(masks) if masks else torch.empty(0, dtype=torch.bool, device=device)
    return pack(flat.byte(), 1), wrong


def _guesses(
    coefficients: Tensor,
    directions: Tensor,
    shift: Tensor,
    limit: Tensor,
    first: int,
    p: float,
    seed: int | Tensor,
    offset: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of whole chunks from row ``first`` on, (chunks, E) each: z~ > 0, whether it is sure, whether it is kept."""
    z = combine(coefficients, directions, shift)
    width = z.size(1)
    elements = chunk_rows(width) * width
    sure = z.abs() >= limit
    kept = torch.ones(z.numel(), dtype=torch.bool, device=z.device)
    if p:
        kept = keep_mask(z.numel(), p=p, seed=seed, device=z.device, offset=offset + first * width)
    missing = -z.numel() % elements
    guess, sure, kept = (F.pad(part.flatten(), (0, missing)).view(-1, elements) for part in (z > 0, sure, kept))
    return guess, sure, kept


def _gaps(wrong: Tensor, certain: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """The list of gaps of each chunk, uint8 (chunks, room) and as far as it fits, and how long it is."""
    chunk, element = wrong.nonzero(as_tuple=True)
    position = certain.cumsum(1)[chunk, element]
    before = torch.where(
        F.pad(chunk, (1, 0), value=-1)[:-1] == chunk, F.pad(position, (1, 0))[:-1], torch.zeros_like(position)
    )
    skipped = position - before - 1
    size = skipped // ESCAPE + 1
    number = torch.zeros(len(wrong), dtype=torch.int64, device=wrong.device).scatter_add_(0, chunk, size)
    last = size.cumsum(0) - 1  # in one list of all chunks
    last = last - (number.cumsum(0) - number)[chunk]
    gaps = torch.full((len(wrong), room + 1), ESCAPE, dtype=torch.uint8, device=wrong.device)
    gaps[chunk, last.clamp(max=room)] = (skipped % ESCAPE).byte()
    return gaps[:, :room], number
