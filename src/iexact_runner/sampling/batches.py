"""Mini-batches: what a sampler draws becomes what a training step works on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iexact_runner.config import BatchSamplerConfig, ClusterConfig, Config, NeighborConfig, SaintConfig
from iexact_runner.data.dataset import NodeDataset
from iexact_runner.data.graph import Adjacency, edge_count, edges_of, training_subgraph
from iexact_runner.data.sparse import CSR
from iexact_runner.layerwise import CHAINS
from iexact_runner.nn import Model, model_class_of
from iexact_runner.problem import Problem, View
from iexact_runner.sampling.partition import Partition, find_partition
from iexact_runner.sampling.saint import Inclusion, inclusion
from iexact_runner.sampling.samplers import ClusterSampler, NeighborSampler, SaintSampler, Sampler
from iexact_runner.sampling.subgraph import Pattern


class MiniBatches:
    """The batches of an epoch as views of a graph, each drawn from (seed, epoch, batch) alone.

    Args:
        sampler: what draws them.
        pattern: of the graph that it draws from.
        view: the training view on the host.
        model_class: of the model, which says how it takes the edges of some nodes.
        device: where a batch goes.
        inclusion: GraphSAINT's weights; None takes plain means.
        partition: that the sampler draws from, if it does.
    """

    def __init__(
        self,
        sampler: Sampler,
        pattern: Pattern,
        view: View,
        model_class: type[Model],
        device: torch.device,
        *,
        inclusion: Inclusion | None = None,
        partition: Partition | None = None,
    ) -> None:
        self._sampler = sampler
        self._pattern = pattern
        self._view = view
        self._model_class = model_class
        self._device = device
        self._inclusion = inclusion
        self._partition = partition
        self._trained = torch.zeros(view.x.size(0), dtype=torch.bool)
        self._trained[view.train] = True

    def __len__(self) -> int:
        return len(self._sampler)

    @property
    def partition(self) -> dict[str, Any] | None:
        """How the partition was found, if there is one."""
        return None if self._partition is None else self._partition.record()

    def tensors(self) -> list[Tensor]:
        """What batches are drawn from, beside the training view."""
        shares = [] if self._inclusion is None else [self._inclusion.nodes, self._inclusion.edges]
        return [self._trained, *self._pattern.csr.tensors(), *map(torch.from_numpy, shares)]

    def view(self, batch: int, *, seed: int, epoch: int) -> View:
        """A batch, counted from 0, on the device."""
        part = self._sampler.draw(batch, seed=seed, epoch=epoch)
        nodes = torch.from_numpy(part.nodes)
        trained = torch.from_numpy(part.seeds) if part.seeds is not None else self._trained[nodes].nonzero().squeeze(1)
        if nodes.numel() < 2:  # whose BatchNorm has no deviation
            trained = trained[:0]
        graph = self._model_class.build_graph(torch.from_numpy(part.edge_index), nodes.numel())
        weights = None
        if self._inclusion is not None:
            weights = self._inclusion.loss_weights(part, self._view.train.numel())
            if self._model_class.gathers_sums:
                assert isinstance(graph, Adjacency) and isinstance(self._view.graph, Adjacency)
                graph = self._inclusion.normalized(graph, part, self._view.graph)
        return View(self._view.x[nodes], self._view.y[nodes], graph, trained, weights).to(self._device)


def with_batches(problem: Problem, config: Config, dataset: NodeDataset, *, device: torch.device) -> Problem:
    """The problem with the batches of a sampler; as it is for full batch.

    Args:
        problem: on the host.
        config: of the run.
        dataset: that the problem was made of.
        device: where batches go.

    Raises:
        ConfigError: if the sampler does not fit the graph or the model.
    """
    sampling, view = config.sampler, problem.training
    if not isinstance(sampling, BatchSamplerConfig):
        return problem
    pattern = Pattern(_pattern_of(view, config, dataset))
    given: dict[str, Any] = {}
    sampler: Sampler
    if isinstance(sampling, ClusterConfig):
        root = Path(config.dataset.root)
        given["partition"] = found = find_partition(pattern, sampling.parts, method=sampling.partition, folder=root)
        sampler = ClusterSampler(pattern, found.parts, batch_parts=sampling.batch_parts)
    elif isinstance(sampling, SaintConfig):
        sampler = saint = SaintSampler(pattern, sampling)
        if sampling.normalization:
            given["inclusion"] = inclusion(saint, pattern, coverage=sampling.sample_coverage, seed=config.seed)
    else:
        assert isinstance(sampling, NeighborConfig)
        sampler = NeighborSampler(pattern, view.train.numpy(), sampling)
    model_class = model_class_of(config.model)
    batches = MiniBatches(sampler, pattern, view, model_class, device, **given)
    layerwise = sampling.evaluation == "layerwise" and issubclass(model_class, CHAINS)
    if layerwise:
        return replace(problem, batches=batches, layerwise=True, maps_folder=sampling.maps_folder)
    nodes = {name: getattr(problem, name).to(device) for name in ("val", "test")}
    return replace(problem, batches=batches, whole=problem.whole.to(device), **nodes)


def _pattern_of(view: View, config: Config, dataset: NodeDataset) -> CSR:
    """The edges between the nodes of the training view; the model's own matrix where it is the same."""
    edge_index = dataset.edge_index
    if config.dataset.inductive:
        edge_index = training_subgraph(edge_index, dataset.train, dataset.num_nodes)
    # Edges stand there once, so as many entries are the same ones.
    if isinstance(view.graph, Adjacency) and edge_count(view.graph) == edge_index.size(1):
        return view.graph.matrix
    return edges_of(edge_index, view.x.size(0))
