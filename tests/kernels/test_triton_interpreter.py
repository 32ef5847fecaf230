"""The Triton kernels, run on tiny maps by Triton's interpreter, equal the reference bit for bit.

Each test runs this file as a script: ``TRITON_INTERPRET`` must be set before the kernels are decorated, and then
holds for all of Triton in that process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import cycle, product
from typing import cast

import pytest
import torch

from iexact_runner.kernels import parity, reference
from iexact_runner.kernels.parity import Case

pytest.importorskip("triton")


def quantizer_cases(count: int, block_size: int, bits: int, *, dtype: torch.dtype, offset: int) -> Iterator[Case]:
    x = parity.filled("skewed", (count,), dtype)
    levels = parity.uneven_levels(bits) if count % 2 else None
    form = {"bits": bits, "block_size": block_size, "levels": levels}
    yield Case("quantize", (x,), {**form, "seed": torch.tensor(-5), "offset": offset}, str(count))
    stored = reference.quantize(x, bits=bits, block_size=block_size, levels=levels, seed=1)
    yield Case("dequantize", stored, {**form, "shape": (count,), "dtype": dtype}, str(count))


def short_cases() -> Iterator[Case]:
    """Maps that fill no tile, end within a byte, or have blocks that share one; draws that straddle Philox calls."""
    sizes = ((1, 8), (100, 16), (318, 63), (131, 64), (97, 7), (70, 1), (75, 24), (300, 1000))
    offsets, dtypes = cycle((0, 3, 2**33 + 13)), cycle(parity.DTYPES)
    for (count, block_size), bits in product(sizes, parity.BITS):
        yield from quantizer_cases(count, block_size, bits, dtype=next(dtypes), offset=next(offsets))


def long_cases() -> Iterator[Case]:
    """Several programs; blocks up to the largest tile, and past it."""
    for block_size in (8192, 8200, 2056, 4097, 9002, 15):
        yield from quantizer_cases(9002, block_size, 2, dtype=torch.float32, offset=6)
    x = parity.filled("nan", (8195,), torch.bfloat16)
    random = {"p": 0.3, "seed": torch.tensor(-7), "offset": 2**35 + 1}
    yield Case("leaky_relu_dropout", (x,), {"negative_slope": 0.2, **random}, "8195")
    yield Case("dropout_mask", (8195,), random, "8195")


def extreme_cases() -> Iterator[Case]:
    """Numbers at the edges of the types, in every function that rounds them."""
    numbers = [0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45, 1e-38, -1e-38, 3.4e38, -3.4e38]
    numbers += [65504.0, -65504.0, 65519.0, 6e-8, -6e-8, 3.0e-5, 1.00390625, 1.01171875, 3.3961e38]
    for dtype, slope in product(parity.DTYPES, (0.0, 0.2, -0.3)):
        x = torch.tensor(numbers).to(dtype)
        mask = torch.tensor([0b10110010, 0b01101011, 0b00011101], dtype=torch.uint8)
        random = {"p": 0.3, "seed": 5, "offset": 1}
        yield Case("leaky_relu", (x,), {"negative_slope": slope}, "extreme")
        yield Case("leaky_relu_backward", (x, mask), {"negative_slope": slope}, "extreme")
        yield Case("apply_dropout_mask", (x, mask), {"p": 0.3}, "extreme")
        yield Case("leaky_relu_dropout", (x,), {"negative_slope": slope, **random}, "extreme")
        yield Case("leaky_relu_dropout_backward", (x, mask), {"negative_slope": slope, **random}, "extreme")
    for dtype, bits, block_size in product(parity.DTYPES, (1, 8), (1, 2, 8)):
        x = torch.tensor(numbers).to(dtype)
        form = {"bits": bits, "block_size": block_size, "levels": None}
        yield Case("quantize", (x,), {**form, "seed": 5}, "extreme")


def sketch_cases() -> Iterator[Case]:
    """Errors of sure signs with as many right ones between them as a byte counts, and more; blocks with NaN."""
    for width in (40, 63, 128):
        c, v, shift = (parity.filled("normal", size, torch.float32) for size in ((16, 3), (width, 3), (width,)))
        sign = (reference.combine(c, v, shift) > 0).flatten()
        sign[[7, 262, 518, 633]] ^= True  # 254, 255 and a few apart
        mask, limit, form = reference.pack(sign.byte(), 1), torch.zeros(width), {"exact": True, "p": 0.0, "seed": 1}
        sketch = (c, v, shift, limit)
        yield Case("pack_signs", (mask, *sketch), form, f"{width} far apart")
        streams, counts = reference.pack_signs(mask, *sketch, **form)
        stream = reference.join_streams(streams, counts, capacity=int(reference.stream_lengths(counts).sum()))
        yield Case("unpack_signs", (stream, counts, *sketch), form, f"{width} far apart")
    for width in (5, 516):  # narrower and wider than the kernels: the reference draws from the same place
        c, v, shift = (parity.filled("normal", size, torch.float32) for size in ((16, 3), (width, 3), (width,)))
        mask, sketch = reference.pack((c @ v.T > 0).flatten().byte(), 1), (c, v, shift, torch.ones(width))
        form = {"exact": True, "p": 0.3, "seed": 1, "offset": 8 * width}
        yield Case("pack_signs", (mask, *sketch), form, f"width {width}")
        streams, counts = reference.pack_signs(mask, *sketch, **form)
        stream = reference.join_streams(streams, counts, capacity=int(reference.stream_lengths(counts).sum()))
        yield Case("unpack_signs", (stream, counts, *sketch), form, f"width {width}")
    for special, (rank, rows, bits) in product((torch.nan, torch.inf), ((8, 4, 4), (16, 4, 4), (8, 1, 2), (24, 2, 1))):
        z = (10 * parity.filled("normal", (40, 100), torch.float32)).round()
        matrix, z[5, 3] = (3 * parity.filled("normal", (100, rank), torch.float32)).round(), special
        form = {"bits": bits, "block_size": rows * rank, "levels": None, "seed": 1}
        yield Case("quantize_product", (z, matrix, torch.ones(rank)), form, f"{special} rank {rank}")


SELECTIONS = {
    "quick": lambda: parity.cases(quick=True),
    "short": short_cases,
    "long": long_cases,
    "extreme": extreme_cases,
    "sketch": sketch_cases,
}


@pytest.mark.parametrize("selection", SELECTIONS)
def test_interpreted_kernels_equal_the_reference(selection: str) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, selection],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    count, found = cast("tuple[int, list[str]]", json.loads(run.stdout.splitlines()[-1]))
    assert count >= 14
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("rank", "block_size", "dtype", "fits"),
    [
        (8, 8, torch.float32, True),
        (8, 128, torch.float32, True),
        (24, 24 * 64, torch.float32, True),
        (64, 64, torch.float32, True),
        (72, 72, torch.float32, False),  # more coefficients than a program holds
        (12, 48, torch.float32, False),  # rows share bytes
        (8, 12, torch.float32, False),  # blocks end within rows
        (8, 24, torch.float32, False),  # a program has no whole number of blocks of three rows
        (8, 8 * 128, torch.float32, False),  # longer than a program's rows
        (8, 128, torch.bfloat16, False),
    ],
)
def test_one_kernel_multiplies_and_quantizes_what_fits(rank, block_size, dtype, fits):
    from iexact_runner.kernels.triton import product as triton_product

    assert triton_product.fits(torch.empty(10, 100, dtype=dtype), rank, block_size) == fits


def main(selection: str) -> None:
    from iexact_runner.kernels import triton as triton_kernels

    torch.use_deterministic_algorithms(True)  # which fills every torch.empty with NaN or the largest integer
    cases = list(SELECTIONS[selection]())
    found = parity.mismatches(triton_kernels, torch.device("cpu"), cases)
    print(json.dumps([len(cases), found]))


if __name__ == "__main__":
    main(sys.argv[1])
