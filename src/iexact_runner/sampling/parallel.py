"""A graph over several processes: in which order its nodes stand, which rows each process has, and its problem.

Nodes are numbered anew, part by part of a partition, and a process has a run of parts. The order depends on the graph
and the number of parts alone, not on that of the processes: two processes with two parts each compute what four with
one part each do.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from iexact_runner.config import Config, ParallelConfig
from iexact_runner.data.dataset import NodeDataset
from iexact_runner.data.graph import Adjacency, EdgePattern, ScaledAdjacency, edge_count, edges_of, training_subgraph
from iexact_runner.data.part_files import PartFolder
from iexact_runner.data.partitioned import halo_of, partitioned, with_exact_messages
from iexact_runner.data.parts import GraphInParts, OrderedGraph, Rows
from iexact_runner.errors import ConfigError
from iexact_runner.nn import model_class_of
from iexact_runner.parallel.messages import format_of
from iexact_runner.parallel.shard import DistributedShard
from iexact_runner.parallel.team import Team
from iexact_runner.problem import Problem, View
from iexact_runner.sampling.partition import find_partition
from iexact_runner.sampling.subgraph import Pattern

# What the record of a part says of one process.
OF_A_PROCESS = ("nodes", "halo", "edges", "loading_peak_resident_mib")
# Rows of a part are a multiple of this, so that packed masks and draws of its maps begin with a byte.
ROWS = 8


class Order(NamedTuple):
    """Nodes in the order of their parts.

    Args:
        nodes: old number (N,) of the node at each place.
        cuts: first place of each part, and N.
    """

    nodes: Tensor
    cuts: tuple[int, ...]


def aligned_order(parts: np.ndarray[Any, Any], count: int, *, rows: int) -> Order:
    """Nodes sorted by part, each part but the last moved to whole multiples of ``rows``."""
    nodes = torch.from_numpy(np.argsort(parts, kind="stable"))
    ends = np.cumsum(np.bincount(parts, minlength=count))
    total = len(parts)
    cuts = [0, *(min(total, rows * round(end / rows)) for end in ends[:-1].tolist()), total]
    return Order(nodes, tuple(int(cut) for cut in np.maximum.accumulate(cuts)))


def rows_of_parts(config: Config) -> int:
    """What the first row of a part is a multiple of: blocks of the published layout hold whole rows of one part."""
    return int(np.lcm(ROWS, max(1, config.compression.col_size)))


def in_parts(dataset: NodeDataset, config: Config, team: Team) -> OrderedGraph:
    """A whole graph in the order of its parts, which the first process finds.

    Args:
        dataset: the graph, the same in every process.
        config: of the run.
        team: the processes.

    Raises:
        ConfigError: if there are more parts than nodes, or fewer than processes, or the processes have other graphs.
    """
    parallel = config.parallel
    assert isinstance(parallel, ParallelConfig)
    count = parallel.parts or team.size
    _check_enough(count, team)
    if count > dataset.num_nodes:
        raise ConfigError.of("parallel.parts", count, f"must be at most the {dataset.num_nodes} nodes")
    sums = [float(part.double().sum()) for part in (dataset.x, dataset.y, dataset.edge_index, dataset.train)]
    team.agree(graph=(dataset.num_nodes, dataset.edge_index.size(1), *sums))
    found = None
    if team.first:
        pattern = Pattern(edges_of(dataset.edge_index, dataset.num_nodes))
        method, folder = parallel.partition, Path(config.dataset.root)
        partition = find_partition(pattern, count, method=method, folder=folder, field="parallel")
        found = aligned_order(partition.parts, count, rows=rows_of_parts(config)), partition.record()
    order: Order
    order, record = team.from_first(found)
    training = _training_nodes(dataset, order, rows=rows_of_parts(config)) if config.dataset.inductive else None
    return OrderedGraph(dataset, order.nodes, order.cuts, partition=record, training=training)


def _training_nodes(dataset: NodeDataset, order: Order, *, rows: int) -> OrderedGraph:
    """The graph of the training nodes, in the parts of the whole one."""
    nodes, count = dataset.train, len(order.cuts) - 1
    parts = torch.bucketize(order.nodes.argsort()[nodes], torch.tensor(order.cuts[1:-1]), right=True)
    edges = training_subgraph(dataset.edge_index, nodes, dataset.num_nodes)
    all_nodes, none = torch.arange(nodes.numel()), torch.arange(0)
    graph = NodeDataset(dataset.x[nodes], dataset.y[nodes], edges, all_nodes, none, none, dataset.num_classes)
    own = aligned_order(parts.numpy(), count, rows=rows)
    return OrderedGraph(graph, own.nodes, own.cuts)


def read_parts(config: Config, team: Team) -> PartFolder:
    """The graph that ``task=partition`` wrote to ``parallel.folder``.

    Raises:
        ConfigError: if it is of another dataset, or cut in another way than the run needs, or if the processes have
            different ones.
        DatasetError: if it is damaged.
    """
    parallel = config.parallel
    assert isinstance(parallel, ParallelConfig) and parallel.folder is not None
    graph = PartFolder(Path(parallel.folder), config.dataset)
    team.agree(graph=graph.fingerprint)
    count, rows = graph.facts.num_parts, rows_of_parts(config)
    if parallel.parts not in (None, count):
        raise ConfigError.of("parallel.parts", parallel.parts, f"{parallel.folder} has {count}; use null")
    _check_enough(count, team)
    if any(cut % rows for cut in graph.facts.cuts[:-1]):
        valid = f"needs parts of whole multiples of {rows} rows: task=partition with it writes such a folder"
        raise ConfigError.of("compression.col_size", config.compression.col_size, valid)
    return graph


def _check_enough(parts: int, team: Team) -> None:
    if parts < team.size:
        raise ConfigError.of("parallel.parts", parts, f"must be at least the number of processes, {team.size}")


def parallel_problem(
    graph: GraphInParts, config: Config, team: Team, device: torch.device, *, cache_first_aggregate: bool = False
) -> tuple[Problem, dict[str, Any]]:
    """What this process trains on, on its device, and the record of its part.

    Args:
        graph: in memory or in files, the same in every process.
        config: of the run.
        team: the processes.
        device: of this one.
        cache_first_aggregate: keep the product of the adjacency with the features.

    Raises:
        DatasetError: if a file is damaged.
    """
    whole, rows = _view_of(graph, config, team, device, cached=cache_first_aggregate)
    training = whole
    if graph.training is not None:
        training, _ = _view_of(graph.training, config, team, device, cached=cache_first_aggregate)
    _, val, test = (split.to(device) for split in rows.splits)
    facts, halo = graph.facts, halo_of(whole.graph)
    problem = Problem(training, whole, val, test, facts.num_classes, None)
    assert halo is not None
    record = {"parts": facts.num_parts, **facts.partition, "processes": team.size}
    return problem, record | {"nodes": halo.shard.rows, "halo": halo.size, "edges": edge_count(whole.graph)}


def _view_of(
    graph: GraphInParts, config: Config, team: Team, device: torch.device, *, cached: bool
) -> tuple[View, Rows]:
    """What a model sees of a graph in this process, and its rows."""
    facts = graph.facts
    bounds = [facts.num_parts * rank // team.size for rank in range(team.size + 1)]
    shard = DistributedShard([facts.cuts[bound] for bound in bounds], team.rank)
    rows = graph.rows(*bounds[team.rank : team.rank + 2])
    build, chosen = model_class_of(config.model).build_graph, config.messages
    assert isinstance(build, (ScaledAdjacency, EdgePattern)) and isinstance(config.parallel, ParallelConfig)
    forward, backward = (
        format_of(name, rank=chosen.rank, share=config.parallel.halo_sample)
        for name in (chosen.forward, chosen.backward)
    )
    interval = chosen.delta_interval if chosen.delta else None
    held = partitioned(
        build, rows.sources, rows.targets, shard, forward=forward, backward=backward, delta_interval=interval
    )
    mine, x = held.map(lambda part: part.to(device)), rows.x.to(device)
    exact = with_exact_messages(mine)
    if cached and isinstance(mine, Adjacency) and isinstance(exact, Adjacency):
        # What is exchanged once may be exact, and what is kept for the whole run should be.
        mine = replace(mine, known=(x, exact.matmul(x)))
    # Each loss counts by all training nodes, so that the losses of the processes add up to the mean.
    weights = torch.full((shard.rows,), 1 / max(1, facts.num_train), device=device)
    return View(x, rows.y.to(device), mine, rows.splits[0].to(device), weights), rows


def traffic_record(problem: Problem) -> dict[str, Any]:
    """Bytes that this process sent, and seconds that it waited, in training and evaluation."""
    halos = [
        halo_of(view.graph) for view in ([problem.training, problem.whole] if problem.inductive else [problem.whole])
    ]
    found = [halo.traffic for halo in halos if halo is not None]
    return {
        "sent_mib": sum(traffic.sent_bytes for traffic in found) / 2**20,
        "exchanges": sum(traffic.exchanges for traffic in found),
        "waiting_seconds": sum(traffic.waiting_seconds for traffic in found),
    }
