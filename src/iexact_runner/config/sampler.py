"""Fields of the samplers of mini-batches."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from iexact_runner.config.checks import check, check_at_least, check_choice

PARTITIONERS = ("auto", "metis", "label_propagation")
EVALUATIONS = ("full", "layerwise")


@dataclass
class SamplerConfig:
    """Full-batch training: every step takes the whole graph.

    Args:
        name: which sampler; ``sampler=NAME`` chooses it with the fields it needs.
    """

    name: str = MISSING

    def __post_init__(self) -> None:
        valid = f"choose one with sampler={' or sampler='.join(SAMPLER_CONFIGS)}"
        check(SAMPLER_CONFIGS.get(self.name) is type(self), "sampler.name", self.name, valid)


@dataclass
class BatchSamplerConfig(SamplerConfig):
    """Fields that every sampler of mini-batches has.

    Args:
        evaluation: ``layerwise`` computes one layer after the other for a few rows of the whole graph at a time, with
            its maps in the memory of the host; ``full`` does so in one pass. Both are exact.
        maps_folder: folder for files that hold the maps between layers in place of memory; they are gone afterwards.
    """

    evaluation: str = "layerwise"
    maps_folder: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("sampler.evaluation", self.evaluation, EVALUATIONS)
        folder = self.maps_folder
        check(folder != "", "sampler.maps_folder", "''", "must be a folder, or null for memory")
        layerwise = folder is None or self.evaluation == "layerwise"
        check(layerwise, "sampler.maps_folder", folder, "is for sampler.evaluation=layerwise")


@dataclass
class ClusterConfig(BatchSamplerConfig):
    """Cluster-GCN (Chiang et al., 2019): the subgraph of a few parts of a partition.

    Args:
        parts: parts of the partition.
        batch_parts: parts of a batch.
        partition: ``metis`` needs pymetis; ``label_propagation`` needs nothing, and cuts more edges; ``auto`` is METIS
            where it is installed.
    """

    parts: int = 100
    batch_parts: int = 10
    partition: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("sampler.parts", self.parts, 1)
        check(
            1 <= self.batch_parts <= self.parts,
            "sampler.batch_parts",
            self.batch_parts,
            f"must be 1 to sampler.parts={self.parts}",
        )
        check_choice("sampler.partition", self.partition, PARTITIONERS)


@dataclass
class SaintConfig(BatchSamplerConfig):
    """Fields of all samplers of GraphSAINT (Zeng et al., 2020): the subgraph of nodes that are drawn.

    Args:
        steps: batches of an epoch; null is as many as have the graph's number of nodes together.
        normalization: weigh losses and neighbours by how often they are drawn, so that their sums are unbiased
            (section 3.2); false takes the plain means of the subgraph, as the published code of EXACT does.
        sample_coverage: times that an average node is drawn beforehand to find these weights.
    """

    steps: int | None = None
    normalization: bool = True
    sample_coverage: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps is not None:
            check_at_least("sampler.steps", self.steps, 1)
        check_at_least("sampler.sample_coverage", self.sample_coverage, 1)


@dataclass
class SaintWalkConfig(SaintConfig):
    """GraphSAINT's random walks.

    Args:
        roots: nodes that walks begin at.
        walk_length: edges of a walk.
    """

    roots: int = 2000
    walk_length: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("sampler.roots", self.roots, 1)
        check_at_least("sampler.walk_length", self.walk_length, 1)


@dataclass
class SaintNodeConfig(SaintConfig):
    """GraphSAINT's nodes, drawn in proportion to their degree.

    Args:
        nodes: draws of a batch; a node that is drawn twice is in it once.
    """

    nodes: int = 6000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("sampler.nodes", self.nodes, 1)


@dataclass
class SaintEdgeConfig(SaintConfig):
    """GraphSAINT's edges, drawn in proportion to 1 / deg(u) + 1 / deg(v).

    Args:
        edges: draws of a batch; both ends of each are in it.
    """

    edges: int = 4000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("sampler.edges", self.edges, 1)


@dataclass
class NeighborConfig(BatchSamplerConfig):
    """GraphSAGE's neighbours (Hamilton et al., 2017): training nodes, and a few neighbours of each, hop by hop.

    Args:
        num_neighbors: neighbours of a node that are drawn without replacement, by hop; -1 takes all.
        batch_size: training nodes of a batch, each once an epoch.
    """

    num_neighbors: list[int] = field(default_factory=lambda: [15, 10])
    batch_size: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = list(self.num_neighbors)
        valid = bool(counts) and all(count == -1 or count >= 1 for count in counts)
        check(valid, "sampler.num_neighbors", counts, "must be a number for each hop: 1 or more, or -1 for all")
        check_at_least("sampler.batch_size", self.batch_size, 1)


SAMPLER_CONFIGS: dict[str, type[SamplerConfig]] = {
    "none": SamplerConfig,
    "cluster": ClusterConfig,
    "saint_rw": SaintWalkConfig,
    "saint_node": SaintNodeConfig,
    "saint_edge": SaintEdgeConfig,
    "neighbor": NeighborConfig,
}
