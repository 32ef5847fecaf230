"""Seeds of a step's random tensors: the same numbers wherever and however they are written."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import tiny_dataset
from iexact_runner.cli import compose_config
from iexact_runner.compression.seeds import StepSeed, tensor_seed
from iexact_runner.kernels.ops import RowSeed, WrittenSeed, seed_tensor
from iexact_runner.nn import MODELS, build_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("seed", [0, 7, -1, (1 << 63) - 1, -(1 << 63)])
def test_seeds_that_are_written_at_once_are_those_that_are_written_one_by_one(seed):
    step = StepSeed.on(CPU, seed)
    for index in (0, 1, 150, 63, 64, 2):
        found, expected = tensor_seed(step, index), tensor_seed(seed, index)
        assert found == expected and isinstance(found, WrittenSeed)
        assert seed_tensor(found, CPU) is found.tensor and found.tensor.item() == expected
        assert tensor_seed(torch.tensor(seed), index).item() == expected
    # What is on another device is no use.
    assert seed_tensor(found, torch.device("meta")).device.type == "meta"


def test_only_the_plain_seeds_of_a_gpu_are_written_at_once():
    gpu = torch.device("cuda")
    written = StepSeed.where_it_pays(gpu, 7)
    assert isinstance(written, StepSeed) and (written, written.device) == (7, gpu)
    rows, tensor = RowSeed.of(7, 24), torch.tensor(7)
    for device, seed in ((CPU, 7), (gpu, rows), (gpu, tensor), (gpu, written)):
        assert StepSeed.where_it_pays(device, seed) is seed


def test_seeds_of_a_run_of_rows_stay_with_their_rows():
    derived = tensor_seed(RowSeed.of(7, 24), 3)
    assert isinstance(derived, RowSeed) and (derived, derived.first_row) == (tensor_seed(7, 3), 24)


class Writes(TorchDispatchMode):
    """Counts seeds that are written, which nothing else of a step is like."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.count += function is torch.ops.aten.full.default and found.dim() == 0 and found.dtype == torch.int64
        return found


@pytest.mark.parametrize("compression", ["exact", "lowrank", "int4"])
@pytest.mark.parametrize("model", ["sage", "gcn", "gat", "gcn2"])
def test_a_step_is_the_same_and_writes_hardly_any_seed_by_itself(model, compression):
    config, dataset = compose_config(f"model={model}", f"compression={compression}"), tiny_dataset()
    graph = MODELS[model].build_graph(dataset.edge_index, dataset.num_nodes)
    found = []
    for seeds in ((5, 6), (StepSeed.on(CPU, 5), StepSeed.on(CPU, 6))):
        torch.manual_seed(0)
        net = build_model(config.model, in_channels=13, out_channels=3, compression=config.compression).train()
        with Writes() as writes:
            loss = F.cross_entropy(net(dataset.x, graph, seed=seeds[0], map_seed=seeds[1]), dataset.y)
            gradients = torch.autograd.grad(loss, list(net.parameters()))
        found.append((writes.count, gradients))
    (each, expected), (few, gradients) = found
    assert all(torch.equal(*pair) for pair in zip(gradients, expected, strict=True))
    assert few < each / 2, (few, each)
