from __future__ import annotations

import pytest
import torch

from iexact_runner.errors import ConfigError
from iexact_runner.kernels import backends, parity

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "installed", "expected"),
    [
        (CPU, ["numba", "triton"], "numba"),
        (CPU, ["triton"], "torch"),
        (CUDA, ["numba", "triton"], "triton"),
        (CUDA, ["numba"], "torch"),
        (torch.device("mps"), ["numba", "triton"], "torch"),
    ],
    ids=str,
)
def test_auto_takes_what_fits_and_is_there(device, installed, expected, monkeypatch):
    monkeypatch.setattr(backends, "_installed", lambda package: package in installed)
    assert backends.resolve("auto", device) == expected
    assert backends.resolve("torch", device) == "torch"


@pytest.mark.parametrize(
    ("name", "device", "installed", "words"),
    [
        ("jax", CPU, [], "compression.backend=jax: must be one of auto, torch, numba, triton"),
        ("numba", CPU, [], "compression.backend=numba: needs numba; pip install 'iexact-runner[cpu]'"),
        ("triton", CUDA, [], "compression.backend=triton: needs triton, or use auto or torch"),
        ("triton", CPU, ["triton"], "compression.backend=triton: runs on CUDA tensors, not on device cpu"),
        ("numba", CUDA, ["numba"], "compression.backend=numba: runs on CPU tensors, not on device cuda"),
    ],
    ids=str,
)
def test_a_named_backend_never_falls_back(name, device, installed, words, monkeypatch):
    monkeypatch.setattr(backends, "_installed", lambda package: package in installed)
    with pytest.raises(ConfigError) as error:
        backends.resolve(name, device)
    assert words in str(error.value)


def test_what_is_installed_is_what_can_be_imported():
    pytest.importorskip("numba")
    assert backends.resolve("auto", CPU) == backends.resolve("numba", CPU) == "numba"
    assert backends._installed("torch") is True and backends._installed("no_package_of_this_name") is False


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_triton_on_the_gpu_equals_the_reference():
    found = parity.mismatches(backends.select("triton", CUDA), CUDA, parity.cases(quick=True))
    assert not found, "\n".join(found)
