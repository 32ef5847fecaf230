"""A graph over several processes: in which order its nodes stand, which rows each process has, and its problem.

Nodes are numbered anew, part by part of a partition, and a process has a run of parts. The order depends on the graph
and the number of parts alone, not on that of the processes: two processes with two parts each compute what four with
one part each do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from iexact_runner.config import Config, ParallelConfig
from iexact_runner.data.dataset import NodeDataset
from iexact_runner.data.graph import Adjacency, edge_count, edges_of
from iexact_runner.data.partitioned import halo_of, partitioned
from iexact_runner.errors import ConfigError
from iexact_runner.nn import model_class_of
from iexact_runner.parallel.shard import DistributedShard
from iexact_runner.parallel.team import Team
from iexact_runner.problem import Problem, View
from iexact_runner.sampling.partition import find_partition
from iexact_runner.sampling.subgraph import Pattern

# What the record of a part says of one process.
OF_A_PROCESS = ("nodes", "halo", "edges")
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


def find_order(dataset: NodeDataset, config: Config, team: Team) -> tuple[Order, dict[str, Any]]:
    """The order of a graph's nodes, found by the first process, and the record of its partition."""
    parallel = config.parallel
    assert isinstance(parallel, ParallelConfig)
    count = parallel.parts or team.size
    if count < team.size:
        raise ConfigError.of("parallel.parts", count, f"must be at least the number of processes, {team.size}")
    if count > dataset.num_nodes:
        raise ConfigError.of("parallel.parts", count, f"must be at most the {dataset.num_nodes} nodes")
    found = None
    if team.first:
        pattern = Pattern(edges_of(dataset.edge_index, dataset.num_nodes))
        method, folder = parallel.partition, Path(config.dataset.root)
        partition = find_partition(pattern, count, method=method, folder=folder, field="parallel")
        # Blocks of the published layout hold whole rows of one part.
        rows = int(np.lcm(ROWS, max(1, config.compression.col_size)))
        found = aligned_order(partition.parts, count, rows=rows), partition.record()
    order: Order
    order, record = team.from_first(found)
    return order, {"parts": count, **record}


def parallel_problem(
    dataset: NodeDataset, config: Config, team: Team, device: torch.device, *, cache_first_aggregate: bool = False
) -> tuple[Problem, dict[str, Any]]:
    """What this process trains on, on its device, and the record of its part.

    Args:
        dataset: the whole graph, the same in every process.
        config: of the run.
        team: the processes.
        device: of this one.
        cache_first_aggregate: keep the product of the adjacency with the features.

    Raises:
        ConfigError: if the processes have different graphs, or there are more parts than nodes.
    """
    sums = [float(part.double().sum()) for part in (dataset.x, dataset.y, dataset.edge_index, dataset.train)]
    team.agree(graph=(dataset.num_nodes, dataset.edge_index.size(1), *sums))
    order, record = find_order(dataset, config, team)
    bounds = [order.cuts[len(order.cuts[1:]) * rank // team.size] for rank in range(team.size)]
    shard = DistributedShard([*bounds, dataset.num_nodes], team.rank)
    place = torch.empty_like(order.nodes)
    place[order.nodes] = torch.arange(dataset.num_nodes)
    whole = model_class_of(config.model).build_graph(place[dataset.edge_index.long()], dataset.num_nodes)
    messages = config.messages
    graph = partitioned(whole, shard, forward=messages.forward, backward=messages.backward)
    graph = graph.map(lambda part: part.to(device))
    mine = order.nodes[shard.start : shard.stop]
    x = dataset.x[mine].to(device)
    if cache_first_aggregate and isinstance(graph, Adjacency):
        graph = graph.knowing(x)

    def own(nodes: Tensor) -> Tensor:
        places = place[nodes]
        inside = places[(places >= shard.start) & (places < shard.stop)]
        return (inside.sort().values - shard.start).to(device)

    train = own(dataset.train)
    # Each loss counts by all training nodes, so that the losses of the processes add up to the mean.
    weights = torch.full((shard.rows,), 1 / max(1, dataset.train.numel()), device=device)
    view = View(x, dataset.y[mine].to(device), graph, train, weights)
    problem = Problem(view, view, own(dataset.val), own(dataset.test), dataset.num_classes, None)
    halo = halo_of(graph)
    assert halo is not None
    record |= {"processes": team.size, "nodes": shard.rows, "halo": halo.size, "edges": edge_count(graph)}
    return problem, record


def traffic_record(problem: Problem) -> dict[str, Any]:
    """Bytes that this process sent, and seconds that it waited."""
    halo = halo_of(problem.training.graph)
    assert halo is not None
    traffic = halo.traffic
    return {
        "sent_mib": traffic.sent_bytes / 2**20,
        "exchanges": traffic.exchanges,
        "waiting_seconds": traffic.waiting_seconds,
    }
