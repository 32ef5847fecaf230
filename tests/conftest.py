"""Shared pieces of the suite: a tiny graph, configurations, poisoned memory."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from iexact_runner.config import CompressionConfig
from iexact_runner.data.dataset import NodeDataset
from iexact_runner.runs.locks import FOLDER_VARIABLE

# The same examples on every run, however slow the machine.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")

REPOSITORY = Path(__file__).resolve().parents[1]


def projected(**fields: object) -> CompressionConfig:
    """The published layout with some fields changed; by default exact apart from masks."""
    base: dict[str, object] = {"scheme": "projected", "bits": None, "kept_frac": 1.0}
    return CompressionConfig(**(base | fields))  # type: ignore[arg-type]


FP32 = CompressionConfig(scheme="none")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()


def assert_close(actual: Tensor, expected: Tensor, *, tolerance: float = 1e-5) -> None:
    """Fails with the relative error if it exceeds the tolerance; NaN never passes."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error = relative_error(actual, expected)
    assert error <= tolerance, f"relative error {error:.3g} exceeds {tolerance:.3g}"


def bin_widths(x: Tensor) -> Tensor:
    """Bound (N, 1) of |decoded - x| of a map kept in 8 bits a row, with the rounding of the stored zero and scale."""
    x = x.detach()
    return (1.01 * (x.amax(1) - x.amin(1)) / 255 + 2.0**-7 * x.abs().amax(1) / 255).unsqueeze(1)


def tiny_dataset(
    *, nodes: int = 101, features: int = 13, classes: int = 3, symmetric: bool = True, multilabel: bool = False
) -> NodeDataset:
    """A random graph with an isolated node, a self-loop and features that tell the classes apart."""
    generator = torch.Generator().manual_seed(0)
    edges = torch.randint(nodes - 1, (2, 5 * nodes), generator=generator)
    edges = torch.cat([edges, torch.tensor([[2], [2]])], dim=1)
    if symmetric:
        edges = torch.cat([edges, edges.flip(0)], dim=1)
    edges = torch.unique(edges, dim=1)
    labels = torch.randint(classes, (nodes,), generator=generator)
    centres = torch.randn(classes, features, generator=generator)
    x = centres[labels] + 0.5 * torch.randn(nodes, features, generator=generator)
    y = labels
    if multilabel:
        y = torch.nn.functional.one_hot(labels, classes).float()
        y[::3, 0] = 1.0
    order = torch.randperm(nodes, generator=generator)
    return NodeDataset(x, y, edges.int(), order[:60], order[60:80], order[80:], classes)


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Takes Ctrl-C where the suite runs in the background of a shell, which lets its children ignore it."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def share_of_the_cores() -> Iterator[None]:
    """Processes of one suite (pytest -n) share the cores, and so do the processes that their tests start."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    with pytest.MonkeyPatch.context() as patch:
        if workers > 1:
            threads = max(1, torch.get_num_threads() // workers)
            torch.set_num_threads(threads)
            patch.setenv("OMP_NUM_THREADS", str(threads))
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random inputs on every run."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def own_locks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Device locks apart from those of anything else that runs on this machine, also in the processes of tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER_VARIABLE, str(tmp_path_factory.mktemp("locks")))
        yield


@pytest.fixture
def dataset() -> NodeDataset:
    """The symmetric tiny graph."""
    return tiny_dataset()


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``torch.empty`` filled with NaN or 0x55, so that an element nobody writes fails a comparison."""
    plain_empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        tensor: Tensor = plain_empty(*args, **kwargs)  # type: ignore[call-overload]
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 0x55)

    monkeypatch.setattr(torch, "empty", poisoned)
    yield
