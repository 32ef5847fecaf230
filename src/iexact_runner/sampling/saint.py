"""GraphSAINT's normalisation (Zeng et al., 2020, section 3.2): sums over a batch that are right on average.

With C_v and C_uv the numbers of subgraphs, of M that are drawn beforehand, that hold a node and an edge: a neighbour's
share in an aggregate is divided by C_uv / C_v, and a node's loss by C_v / M.
Shapes: N nodes, E edges; n nodes and e edges of a batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from iexact_runner.compression.seeds import mix
from iexact_runner.data.graph import Adjacency
from iexact_runner.data.sparse import CSR
from iexact_runner.sampling.samplers import SaintSampler
from iexact_runner.sampling.subgraph import Array, Part, Pattern

# Seeds of the draws beforehand: apart from those of any batch, whose second part is an epoch from 1.
_BEFOREHAND = 0


@dataclass(frozen=True)
class Inclusion:
    """How often nodes and edges are drawn.

    Args:
        nodes: share (N,) of the subgraphs that hold a node.
        edges: share (E,) of the subgraphs with an edge's target that hold the edge.
    """

    nodes: Array
    edges: Array

    def loss_weights(self, part: Part, trained: int) -> Tensor:
        """Weights (n,) of the losses of a batch's nodes, whose sum estimates the mean over ``trained`` nodes."""
        return torch.from_numpy(1 / (self.nodes[part.nodes] * trained)).float()

    def normalized(self, graph: Adjacency, part: Part, whole: Adjacency) -> Adjacency:
        """The operator of a batch that estimates the rows of the ``whole`` one.

        Args:
            graph: the operator that the model makes of the batch's edges; its pattern may have self-loops more.
            part: the batch.
            whole: the operator on all nodes, whose scales the batch's nodes have.
        """
        nodes = torch.from_numpy(part.nodes)
        matrix = graph.matrix.with_values(self._values(graph.matrix, part))
        transposed, _ = matrix.transposed()
        row_scale, column_scale = (
            None if scale is None else scale[nodes] for scale in (whole.row_scale, whole.column_scale)
        )
        return replace(graph, matrix=matrix, adjoint=transposed, row_scale=row_scale, column_scale=column_scale)

    def _values(self, matrix: CSR, part: Part) -> Tensor:
        """One over the share of each entry; a self-loop is there whenever its node is."""
        size = len(part.nodes)
        sources, targets = part.edge_index.astype(np.int64)
        keys = targets * size + sources
        own = (matrix.rows() * size + matrix.columns).numpy()
        places = np.minimum(np.searchsorted(keys, own), max(0, len(keys) - 1))
        values = np.ones(len(own), dtype=np.float32)
        if len(keys):
            found = keys[places] == own
            values[found] = 1 / self.edges[part.entries[places[found]]]
        return torch.from_numpy(values)


def inclusion(sampler: SaintSampler, pattern: Pattern, *, coverage: int, seed: int) -> Inclusion:
    """Counts what subgraphs hold, as many of them as draw an average node ``coverage`` times."""
    draws = max(1, math.ceil(coverage * pattern.num_nodes / sampler.mean_nodes))
    nodes = np.zeros(pattern.num_nodes, dtype=np.int32)
    edges = np.zeros(pattern.num_edges, dtype=np.int32)
    for draw in range(draws):
        part = sampler.draw(draw, seed=mix(seed), epoch=_BEFOREHAND)
        nodes[part.nodes] += 1
        edges[part.entries] += 1
    targets = np.repeat(np.arange(pattern.num_nodes), np.diff(pattern.offsets))
    # One over a share is what is needed: (M + 1) / (C + 1) is 1 / p on average but for (1 - p)^(M + 1), M / C is not.
    counted = nodes + 1.0
    return Inclusion((counted / (draws + 1)).astype(np.float32), ((edges + 1) / counted[targets]).astype(np.float32))
