"""The cases on which every backend equals the reference bit for bit.

:func:`cases` lists calls of the backend functions; :func:`mismatches` runs each on the reference and on a backend and
names what differs. Codes, masks, zeros and scales must have the same bits; of floating-point maps, only which NaN it
is may differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle, product
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from iexact_runner.kernels import reference
from iexact_runner.kernels.levels import level_table

BITS = (1, 2, 4, 8)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((), (0,), (3, 0), (1,), (7,), (8,), (9,), (63,), (64,), (100,), (1000,), (1031,), (37, 63), (128, 16))
# One longer than what any backend works on at a time, and not a multiple of anything.
LONG = (4099, 5)
BLOCK_SIZES = (1, 3, 7, 63, 64, 100, 1008, 1024, 10000)
SEEDS = (0, 1, -1, -(1 << 40) - 7, 0x0123456789ABCDEF, (1 << 63) - 1)
# Nodes, features and directions (0: the columns): tiles that are full and not, bytes that rows share and do not.
WIDTHS = ((0, 5, 2), (1, 1, 1), (37, 63, 5), (101, 16, 8), (130, 136, 16), (37, 63, 0))
QUICK_WIDTHS = ((9, 7, 0), (17, 24, 8))
# Of sums in float32, relative to them all.
SUM_TOLERANCE = 1e-5
OFFSETS = (0, 3, 8, (1 << 33) + 5)
# Of bfloat16 values three quarters often lie half-way between two.
SLOPES = (0.0, 0.2, 0.75)
PROBABILITIES = (0.0, 0.1, 0.5, 0.999999)
FILLS = (
    "normal",
    "skewed",
    "constant",
    "huge",
    "overflow",
    "subnormal",
    "zeros",
    "nan",
    "infinity",
    "rounded",
    "strided",
)
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class Case:
    """One call of a backend function.

    Args:
        function: its name.
        tensors: its positional arguments.
        options: its keyword arguments.
        label: what is special about it, for people.
        tolerance: largest relative error of its results; None for the same bits.
    """

    function: str
    tensors: tuple[Any, ...]
    options: dict[str, Any]
    label: str
    tolerance: float | None = None

    def __str__(self) -> str:
        """Function, label and options, as a mismatch is reported."""
        options = ", ".join(f"{name}={_short(value)}" for name, value in self.options.items())
        return f"{self.function}[{self.label}]({options})"

    def run(self, kernels: ModuleType, device: torch.device) -> tuple[Tensor, ...]:
        """What the function of a backend returns for tensors on ``device``, always as a tuple."""
        options = {name: _move(value, device) for name, value in self.options.items()}
        if "out" in options:  # which the next backend must find as it was
            options["out"] = options["out"].clone()
        if self.function in ("dropout_mask", "rademacher"):
            options["device"] = device
        result = getattr(kernels, self.function)(*(_move(tensor, device) for tensor in self.tensors), **options)
        return result if isinstance(result, tuple) else (result,)


def mismatches(kernels: ModuleType, device: torch.device, calls: Iterable[Case]) -> list[str]:
    """One line for each tensor of each case in which ``kernels`` on ``device`` differs from the reference on the CPU.

    Args:
        kernels: module that offers the functions of the reference.
        device: where its tensors live.
        calls: what to compare, for example :func:`cases`.
    """
    return [line for case in calls for line in differences(case, kernels, device)]


def differences(case: Case, kernels: ModuleType, device: torch.device) -> list[str]:
    """One line for each tensor in which ``kernels`` differs from the reference in one case."""
    expected, found = case.run(reference, torch.device("cpu")), case.run(kernels, device)
    if len(expected) != len(found):
        return [f"{case}: {len(found)} tensors instead of {len(expected)}"]
    lines = []
    for position, (right, got) in enumerate(zip(expected, found, strict=True)):
        # Zero and scale are part of the format, so their NaN is a certain one.
        exact = case.function in ("quantize", "quantize_product")
        difference = _difference(right, got.cpu(), exact=exact, tolerance=case.tolerance)
        if difference:
            lines.append(f"{case} result {position}: {difference}")
    return lines


def cases(*, quick: bool) -> Iterator[Case]:
    """Calls that cover every backend function.

    Args:
        quick: a few dozen short ones that still touch every function, width and type.
    """
    yield from _quantizer_cases(quick)
    yield from _mask_cases(quick)
    yield from _dropout_cases(quick)
    yield from _rademacher_cases(quick)
    yield from _block_cases(quick)
    yield from _product_cases(quick)
    yield from _coefficient_cases(quick)
    yield from _sign_cases(quick)
    yield from _sparse_cases(quick)


def filled(fill: str, shape: tuple[int, ...], dtype: torch.dtype, *, seed: int = 0) -> Tensor:
    """A map of awkward numbers of one kind.

    Args:
        fill: one of ``FILLS``.
        shape: shape of the map.
        dtype: type of the map.
        seed: seed of the normal numbers that it starts from.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    flat, limit = x.view(-1), torch.finfo(dtype).max
    match fill:
        case "skewed":
            x = x.exp() + 100.0
        case "constant":
            x = torch.full(shape, -1.7)
        case "huge":
            x = x.clamp(-1, 1) * (limit / 2)
        case "overflow":  # a range that no stored scale can hold at 1 bit
            x = torch.where(x > 0, limit, -limit)
        case "subnormal":
            x = x * torch.finfo(dtype).tiny * 0.5
        case "zeros":
            x = torch.where(x > 0, 0.0, -0.0)
        case "nan":
            flat[::97] = torch.nan
            flat[50::211] = -torch.nan
        case "infinity":
            flat[::89] = torch.inf
            flat[60::223] = -torch.inf
        case "rounded":  # small integers: most sit exactly on a level, where h - floor(h) is 0
            x = (x * 2).round()
        case "strided":
            x = torch.randn((*shape, 2), generator=generator)[..., 1].to(dtype)
            return x.mT.contiguous().mT if x.dim() > 1 else x
    return x.to(dtype)


def uneven_levels(bits: int) -> tuple[float, ...]:
    """Increasing levels from 0 to 2**bits - 1, narrow at the ends."""
    top = 2**bits - 1
    return tuple(top * (3 * t * t - 2 * t * t * t) for t in (code / top for code in range(top + 1)))


def _quantizer_cases(quick: bool) -> Iterator[Case]:
    """Calls of quantize, and of dequantize with what the reference's quantize returns."""
    seeds, offsets, fills = cycle(_seeds()), cycle(OFFSETS), cycle(FILLS)
    for turn, (bits, dtype, uneven) in enumerate(product(BITS, DTYPES, (False, True))):
        levels = uneven_levels(bits) if uneven else None
        pairs: list[tuple[tuple[int, ...], int, str]] = []
        if quick:
            chosen = bits == 2 and dtype == torch.float32 if uneven else dtype == DTYPES[BITS.index(bits) % len(DTYPES)]
            pairs = [((37, 3), 7, next(fills))] if chosen else []
        else:
            # Sizes, blocks and numbers vary together, some at a time: all products would take long and show no more.
            sizes = list(product(SHAPES, BLOCK_SIZES))[turn % 4 :: 4]
            pairs += [(shape, block_size, next(fills)) for shape, block_size in sizes]
            pairs += [((37, 63), block_size, fill) for fill, block_size in product(FILLS, (3, 100, 10000))]
            pairs += [(LONG, block_size, "normal") for block_size in (1, 63, 1024, 50000)]
        for shape, block_size, fill in pairs:
            x = filled(fill, shape, dtype)
            form = {"bits": bits, "block_size": block_size, "levels": levels}
            label = _label(x, fill)
            yield Case("quantize", (x,), {**form, "seed": next(seeds), "offset": next(offsets)}, label)
            stored = reference.quantize(x, bits=bits, block_size=block_size, levels=levels, seed=next(seeds))
            yield Case("dequantize", stored, {**form, "shape": shape, "dtype": dtype}, label)


def _mask_cases(quick: bool) -> Iterator[Case]:
    """Calls of leaky_relu and leaky_relu_backward."""
    for slope, (shape, fill, dtype) in product(SLOPES, _maps(quick)):
        x, grad = filled(fill, shape, dtype), filled(fill, shape, dtype, seed=1)
        label, options = _label(x, fill), {"negative_slope": slope}
        yield Case("leaky_relu", (x,), options, label)
        mask = reference.leaky_relu(filled("normal", shape, dtype), **options)[1]
        yield Case("leaky_relu_backward", (grad, mask), options, label)


def _dropout_cases(quick: bool) -> Iterator[Case]:
    """Calls of the functions that drop."""
    seeds, offsets, slopes = cycle(_seeds()), cycle(OFFSETS), cycle(SLOPES)
    for (shape, fill, dtype), p in zip(_maps(quick), cycle(PROBABILITIES), strict=False):
        x = filled(fill, shape, dtype)
        label, seed = _label(x, fill), next(seeds)
        random = {"p": p, "seed": seed, "offset": next(offsets)}
        fused = {"negative_slope": next(slopes), **random}
        mask = reference.leaky_relu(filled("normal", shape, dtype), negative_slope=0.0)[1]
        yield Case("dropout", (x,), random, label)
        yield Case("dropout_mask", (x.numel(),), random, label)
        yield Case("apply_dropout_mask", (x, mask), {"p": p}, label)
        yield Case("leaky_relu_dropout", (x,), fused, label)
        yield Case("leaky_relu_dropout_backward", (x, mask), fused, label)


def _rademacher_cases(quick: bool) -> Iterator[Case]:
    """Calls of rademacher."""
    sizes = ((7, 3),) if quick else ((0, 5), (1, 1), (7, 3), (128, 16), (500, 63), (1031, 4))
    for dtype, (rows, columns), seed in product(DTYPES, sizes, _seeds()[: 1 if quick else None]):
        yield Case("rademacher", (rows, columns), {"seed": seed, "dtype": dtype}, f"{rows}x{columns}")


def _block_cases(quick: bool) -> Iterator[Case]:
    """Calls of the passes of a block; sums are the same in any order where all numbers are small integers."""
    seeds, probabilities = cycle(_seeds()), cycle((0.5, 0.0, 0.1))
    shapes = QUICK_WIDTHS if quick else (*WIDTHS, (4099, 24, 8))
    fills = ("zeros", "nan") if quick else ("normal", "nan", "huge", "strided")
    for (nodes, width, rank), dtype, fill in product(shapes, DTYPES[: 1 if quick else None], fills):
        h, p, seed = filled(fill, (nodes, width), dtype), next(probabilities), next(seeds)
        vectors = [filled("normal", (width,), torch.float32, seed=number) for number in range(4)]
        coefficients = filled("normal", (nodes, rank or width), torch.float32, seed=4)
        directions = filled("normal", (width, rank)[: 2 if rank else 1], torch.float32, seed=5)
        # Rows of a larger map: a multiple of 8 elements come before them.
        random, label = {"p": p, "seed": seed, "offset": 8 * width}, f"{_label(h, fill)} rank {rank}"
        if rank:
            yield Case("normalize_relu_dropout", (h, *vectors), random, label)
        mask = reference.leaky_relu(filled("normal", (nodes, width), dtype, seed=6), negative_slope=0.0)[1]
        factors = (coefficients, directions)
        yield Case("decode_relu_dropout", (*factors, vectors[0], mask), random, label)
        if not quick or fill == "zeros":  # the values that are decoded have nothing to do with those of h
            yield Case("decode_relu_dropout", (*factors, vectors[0], None), {**random, "offset": OFFSETS[3]}, label)
        yield Case("gated_gradient", (h, mask, *factors, *vectors[:2]), random, label)
        if fill in ("zeros", "normal"):
            whole = [_integers(part) for part in (filled("normal", (nodes, width), dtype), *factors)]
            exact = {**random, "p": 0.5 if p else 0.0}
            yield Case("gated_sums", (whole[0], mask, *whole[1:]), exact, f"integers {label}")
            gradient = filled("normal", (nodes, width), dtype)
            yield Case("gated_sums", (gradient, mask, *factors), random, label, tolerance=SUM_TOLERANCE)


def _product_cases(quick: bool) -> Iterator[Case]:
    """Calls of quantize_product with small integers, whose products have one result in any order."""
    seeds = cycle(_seeds())
    forms = [(8, 4, 4), (16, 4, 4), (8, 1, 2), (16, 64, 8), (24, 2, 1), (5, 3, 4), (8, 12, 2)][: 1 if quick else None]
    shapes = ((37, 63),) if quick else ((0, 8), (1, 1), (37, 63), (200, 128), (1031, 500))
    for (nodes, width), (rank, rows, bits) in product(shapes, forms):
        # Up to 12 bits: a product in TF32, which has 11, would show.
        z = _integers(400 * filled("normal", (nodes, width), torch.float32))
        matrix, shift = (
            _integers(filled("normal", shape, torch.float32, seed=1)) for shape in ((width, rank), (rank,))
        )
        levels = uneven_levels(bits) if rows == 12 else None
        form = {"bits": bits, "block_size": rows * rank, "levels": levels, "seed": next(seeds)}
        yield Case("quantize_product", (z, matrix, shift), form, f"integers {nodes}x{width}")


def _coefficient_cases(quick: bool) -> Iterator[Case]:
    """Calls of the functions that deal bits over directions: codes within a byte, over two, and of no bits."""
    levels = level_table(torch.device("cpu"))
    dealt = ((3, 0, 5, 1, 7), (8,), (8, 5, 4, 4, 3, 0, 0, 1, 0), (1,) * 8 + (0,))
    nodes_and_bits = product((37,) if quick else (0, 1, 301), dealt[: 1 if quick else None])
    for (nodes, bits), seed in product(nodes_and_bits, (5,) if quick else (None, 5)):
        coefficients = 1.3 * filled("normal" if quick else "nan", (nodes, len(bits)), torch.float32)
        each, width = torch.tensor(bits, dtype=torch.int32), -(-sum(bits) // 8) * 8
        label = f"{nodes} nodes, bits {' '.join(map(str, bits))}"
        yield Case("quantize_coefficients", (coefficients, each, levels), {"width": width, "seed": seed}, label)
        packed = reference.quantize_coefficients(coefficients, each, levels, width=width, seed=seed)
        yield Case("dequantize_coefficients", (packed, each, levels), {}, label)


def _sign_cases(quick: bool) -> Iterator[Case]:
    """Calls of the functions that store signs: chunks that are full and that are not, streams that are cut off."""
    seeds, limits = cycle(_seeds()), (0.2,) if quick else (0.0, 0.02, 0.3, 2.0, torch.inf)
    shapes = ((37, 8, 2), (37, 8, 0)) if quick else (*WIDTHS, (1300, 100, 12), (41, 520, 3))
    for (nodes, width, rank), limit, exact, p in product(shapes, limits, (False, True), (0.0, 0.5)):
        if quick and not (exact and p):
            continue
        coefficients, directions, shift = (
            filled("normal", shape, torch.float32, seed=seed) / max(1, rank) ** 0.25
            for seed, shape in enumerate(((nodes, rank or width), (width, rank)[: 2 if rank else 1], (width,)))
        )
        z = reference.combine(coefficients, directions, shift) + 0.3 * filled("normal", (nodes, width), torch.float32)
        mask = reference.leaky_relu(z, negative_slope=0.0)[1]
        sketch = (coefficients, directions, shift, torch.full((width,), limit))
        options: dict[str, Any] = {"exact": exact, "p": p, "seed": next(seeds), "offset": 8 * width}
        label = f"{nodes}x{width} rank {rank} limit {limit}"
        yield Case("pack_signs", (mask, *sketch), options, label)
        streams, counts = reference.pack_signs(mask, *sketch, **options)
        total = int(reference.stream_lengths(counts).sum())
        for capacity in (total,) if quick else (total, total // 2):
            if rank:
                yield Case("join_streams", (streams, counts), {"capacity": capacity}, label)
            stream = reference.join_streams(streams, counts, capacity=capacity)
            yield Case("unpack_signs", (stream, counts, *sketch), options, label)


def _sparse_cases(quick: bool) -> Iterator[Case]:
    """Products with sparse matrices, of integers where the order of a sum must not show: rows of none, few and many."""
    hub = (1 << 13) + 3
    degrees = ((0, 3, 5),) if quick else ((), (0,), (1, 0, 4, 8, 2), (7,) * 40, (0, 3, hub, 1))
    widths, indices = ((9,), (torch.int32,)) if quick else ((1, 8, 33, 130), (torch.int32, torch.int64))
    for degree, width, index in product(degrees, widths, indices):
        nodes, generator = len(degree), torch.Generator().manual_seed(width)
        offsets = torch.tensor([0, *degree]).cumsum(0).to(index)
        entries = int(offsets[-1])
        columns = torch.randint(max(nodes, 1), (entries,), generator=generator).to(index)
        x, other = (_integers(filled("normal", (nodes, width), torch.float32, seed=seed)) for seed in (0, 1))
        values = _integers(filled("normal", (entries,), torch.float32))
        scales = {f"{side}_scale": 2.0 ** (torch.arange(nodes) % 4).unsqueeze(1) for side in ("row", "column")}
        bias, label = _integers(filled("normal", (width,), torch.float32)), f"{nodes} nodes, {entries} entries"
        once = (
            torch.rand(nodes, nodes, generator=generator) < 0.5
        ).nonzero()  # torch refuses an entry that is twice there
        firsts = torch.searchsorted(once[:, 0].contiguous(), torch.arange(nodes + 1)).to(index)
        yield Case("sampled_matmul", (firsts, once[:, 1].to(index), x, other), {}, label)
        options = {"values": values, **scales, "bias": bias}
        yield Case("spmm", (offsets, columns, x), {**options, "out": other, "add": True}, label)
        if nodes > 1 and not quick:  # rows of some nodes, as a part of the graph is evaluated
            yield Case("spmm", (offsets[:-1], columns[: int(offsets[-2])], x), {}, f"{label} but the last node's")
        if not quick:
            yield Case("spmm", (offsets, columns, x), {}, label)
            yield Case("spmm", (offsets, columns, x), {**options, "out": other}, label)
            # Of one sign and many rows: thousands that cancel, or are the same few, differ by the order of their sum.
            normal, others = filled("normal", (512, 2 * width), torch.float32).abs()[:, width:], columns * 97 % 512
            others = (others + torch.arange(entries) % 509).to(index) % 512
            wide = scales | {"column_scale": 2.0 ** (torch.arange(512) % 4).unsqueeze(1)}
            yield Case("spmm", (offsets, others, normal), wide, f"strided {label}", tolerance=SUM_TOLERANCE)


def _integers(x: Tensor) -> Tensor:
    """Its numbers, rounded to integers."""
    return (4 * x).round()


def _maps(quick: bool) -> list[tuple[tuple[int, ...], str, torch.dtype]]:
    """Shapes, fills and types of element-wise cases."""
    if quick:
        return [((37, 3), fill, dtype) for fill, dtype in zip(("zeros", "nan", "strided"), DTYPES, strict=True)]
    sizes = [(shape, "normal") for shape in (*SHAPES, LONG)] + [((37, 63), fill) for fill in FILLS]
    return [(shape, fill, dtype) for (shape, fill), dtype in product(sizes, DTYPES)]


def _seeds() -> tuple[int | Tensor, ...]:
    """Seeds of both kinds."""
    return (*SEEDS, torch.tensor(-987654321987654321), torch.tensor(5))


def _label(x: Tensor, fill: str) -> str:
    return f"{fill} {_short(x.dtype)} {'x'.join(map(str, x.shape)) or 'scalar'}"


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"tensor({value.item()})" if value.numel() == 1 else f"tensor {tuple(value.shape)}"
    return "uneven" if isinstance(value, tuple) and len(value) > 2 else str(value).removeprefix("torch.")


def _move(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _difference(expected: Tensor, found: Tensor, *, exact: bool, tolerance: float | None) -> str:
    """What differs between two tensors on the CPU, in words; empty if nothing does."""
    for name in ("dtype", "shape"):
        right, got = getattr(expected, name), getattr(found, name)
        if right != got:
            return f"{name} {got} instead of {right}"
    if tolerance is not None:
        error = ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()
        return "" if error <= tolerance else f"relative error {error:.3g} exceeds {tolerance}"
    as_integers = _INTEGERS[expected.element_size()]
    differs = expected.contiguous().view(as_integers) != found.contiguous().view(as_integers)
    if expected.is_floating_point() and not exact:
        differs &= ~(expected.isnan() & found.isnan())
    count = int(differs.sum())
    if not count:
        return ""
    first = int(differs.flatten().nonzero()[0])
    right, got = expected.flatten()[first].item(), found.flatten()[first].item()
    return f"{count} of {expected.numel()} elements differ, first at {first}: {got!r} instead of {right!r}"
