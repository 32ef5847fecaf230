"""The Numba kernels equal the reference bit for bit, whatever the number of threads."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

numba = pytest.importorskip("numba")

from iexact_runner.kernels import numba as numba_kernels  # noqa: E402
from iexact_runner.kernels import parity, reference  # noqa: E402
from iexact_runner.kernels.numba import common as numba_common  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts PyTorch's number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("poisoned_empty")
def test_equals_the_reference() -> None:
    found = parity.mismatches(numba_kernels, CPU, parity.cases(quick=False))
    assert not found, "\n".join([f"{len(found)} differences", *found[:20]])


@pytest.mark.parametrize(
    "inner",
    [
        torch.arange(1.0, 255.0).double() / 1000,  # hundreds in one cell of the table that is searched
        255 - torch.arange(254.0, 0.0, -1.0).double() / 1000,
        torch.arange(1.0, 255.0).double() * 255 / 256,  # on the edges of cells
        (torch.rand(254, generator=torch.Generator().manual_seed(3)).double() * 255).sort().values,
    ],
    ids=["low", "high", "edges", "random"],
)
def test_codes_of_any_levels_are_those_of_the_reference(inner: torch.Tensor) -> None:
    levels = (0.0, *inner.tolist(), 255.0)
    table = torch.tensor(levels)
    # Scale 1 and zero 0, so that h is x: on every level, beside it, and anywhere.
    x = torch.cat([table, table.nextafter(table.flip(0)).clamp(0, 255), torch.rand(5000) * 255])
    form = {"bits": 8, "block_size": x.numel(), "levels": levels, "seed": 4}
    expected, found = reference.quantize(x, **form), numba_kernels.quantize(x, **form)
    assert expected[2].item() == 1 and expected[1].item() == 0
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_works_where_there_is_no_place_for_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    assert numba_common._cache_folder() is not None

    def no_locator(**_: object) -> None:
        raise RuntimeError("cannot cache function")

    monkeypatch.setattr(numba_common.numba, "njit", no_locator)
    assert numba_common._cache_folder() is None


def test_code_that_another_file_has_changed_is_compiled_anew(tmp_path):
    changed, unchanged, cache = (tmp_path / name for name in ("changed", "unchanged", "cache"))
    for folder in (changed, unchanged, cache):
        folder.mkdir()
    for path, time in (
        (changed / "common.py", 200),
        (unchanged / "philox.py", 100),
        (cache / "kernel.nbi", 150),
        (cache / "other.nbi", 250),
        (cache / "kernel.1.nbc", 150),
    ):
        path.touch()
        os.utime(path, (time, time))
    numba_common._forget_outdated(cache, tmp_path / "archive.zip")
    numba_common._forget_outdated(cache, unchanged)
    assert len(list(cache.iterdir())) == 3
    numba_common._forget_outdated(cache, unchanged, changed)
    assert sorted(path.name for path in cache.iterdir()) == ["kernel.1.nbc", "other.nbi"]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("count", [1, 2, 3])
def test_does_not_depend_on_threads(count: int) -> None:
    before = numba.get_num_threads()
    torch.set_num_threads(count)
    assert parity.mismatches(numba_kernels, CPU, parity.cases(quick=True)) == []
    x = torch.randn(40_013)
    whole = numba_kernels.quantize(x, bits=2, block_size=100, levels=None, seed=3)
    torch.set_num_threads(1)
    alone = numba_kernels.quantize(x, bits=2, block_size=100, levels=None, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(whole, alone, strict=True))
    assert numba.get_num_threads() == before


@pytest.mark.usefixtures("threads")
def test_threads_of_torch_are_put_back() -> None:
    torch.set_num_threads(2)
    with numba_common.torch_threads():
        torch.set_num_threads(1)
    assert torch.get_num_threads() == 2


@pytest.fixture
def double_by_default() -> Iterator[None]:
    """Tensors of float64 where nobody says another type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_does_not_depend_on_the_default_type(request: pytest.FixtureRequest) -> None:
    cases = list(parity.cases(quick=True))
    expected = [case.run(reference, CPU) for case in cases]
    request.getfixturevalue("double_by_default")
    for module in (reference, numba_kernels):
        for case, tensors in zip(cases, expected, strict=True):
            exactly = {"rtol": case.tolerance or 0.0, "atol": 1e-6 if case.tolerance else 0.0}
            torch.testing.assert_close(case.run(module, CPU), tensors, equal_nan=True, **exactly, msg=str(case))


@pytest.mark.parametrize("cut", [8, 100, 4096, 10_007])
def test_pieces_equal_the_whole(cut: int) -> None:
    x = torch.randn(20_011)
    whole = numba_kernels.dropout(x, p=0.4, seed=5)
    pieces = [numba_kernels.dropout(x[:cut], p=0.4, seed=5), numba_kernels.dropout(x[cut:], p=0.4, seed=5, offset=cut)]
    assert torch.equal(torch.cat(pieces), whole)


def test_products_and_sums_round_separately() -> None:
    """Some of these products have more bits than float32 holds, so a fused multiply-add would show."""
    scale = torch.tensor([1 / 3]).to(torch.bfloat16)
    zero = torch.tensor([-1.0e-3]).to(torch.bfloat16)
    codes = torch.arange(256, dtype=torch.uint8)
    decoded = numba_kernels.dequantize(
        codes, zero, scale, bits=8, block_size=256, levels=parity.uneven_levels(8), shape=(256,), dtype=torch.float32
    )
    table = torch.tensor(parity.uneven_levels(8), dtype=torch.float32)
    fused = (table.double() * scale.double() + zero.double()).float()
    assert torch.equal(decoded, table * scale.float() + zero.float())
    assert not torch.equal(decoded, fused)


def test_input_that_requires_a_gradient() -> None:
    x = torch.randn(9, 7, requires_grad=True)
    y, mask = numba_kernels.leaky_relu_dropout(x, negative_slope=0.1, p=0.5, seed=1)
    assert not y.requires_grad
    assert mask.shape == (8,)
