"""Fields of the datasets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

from omegaconf import MISSING

from iexact_runner.config.checks import check, check_above, check_at_least, check_choice

SOURCES = ("ogb", "pyg", "digits", "synthetic", "file")
FEATURES = ("given", "degree", "one_hot")
STANDARDIZE_OVER = ("all", "train")
# What is in the sources that need files.
NAMES = {
    "ogb": ("arxiv", "products"),
    "pyg": (
        *("flickr", "reddit", "reddit2", "yelp", "amazon_computers", "amazon_photo", "coauthor_cs", "coauthor_physics"),
        *("cora", "citeseer", "pubmed", "tolokers"),
    ),
}


@dataclass
class DatasetConfig:
    """Fields that every dataset has.

    Args:
        name: which dataset; ``dataset=NAME`` chooses it with the fields it needs.
        source: the loader.
        root: folder where its files lie or are put.
        inductive: train on the subgraph of the training nodes only.
        undirected: add the reverse of every edge.
        standardize: scale features to mean 0 and deviation 1.
        standardize_over: ``all`` nodes, as the published code does, or the ``train`` nodes.
        split_seed: draws the 60/20/20 split where none is published.
        trust_pickle: let dataset files that are pickles run what they say.
    """

    name: str = MISSING
    source: str = MISSING
    root: str = "data"
    inductive: bool = False
    undirected: bool = False
    standardize: bool = False
    standardize_over: str = "all"
    split_seed: int = 0
    trust_pickle: bool = False

    def __post_init__(self) -> None:
        check_choice("dataset.source", self.source, SOURCES)
        check_choice("dataset.standardize_over", self.standardize_over, STANDARDIZE_OVER)
        own = None if self.source in NAMES else self.source
        valid = f"needs its own fields; start from dataset={own}" if own else "choose one with dataset=NAME"
        check(DATASET_PREFIXES.get(type(self)) == own, "dataset.source", self.source, valid)
        if self.source in NAMES:
            check_choice("dataset.name", self.name, NAMES[self.source])
        check(bool(self.root), "dataset.root", repr(self.root), "must be a folder")
        check_at_least("dataset.split_seed", self.split_seed, 0)


@dataclass
class DigitsConfig(DatasetConfig):
    """Handwritten digits as a symmetric k-nearest-neighbour graph.

    Args:
        neighbors: nearest others that an image is joined to.
    """

    neighbors: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check(1 <= self.neighbors <= 1796, "dataset.neighbors", self.neighbors, "must be between 1 and 1796")


@dataclass
class SyntheticConfig(DatasetConfig):
    """A degree-corrected block model with label-dependent features.

    Args:
        num_nodes: N.
        average_degree: directed edges a node.
        num_features: D.
        num_classes: number of classes, alike in size.
        homophily: share of the edges that stay within a class.
        degree_exponent: exponent of the power law of the weights that nodes draw edges with.
        num_train: training nodes of the split; null for all three sizes is 60/20/20.
        num_val: validation nodes.
        num_test: test nodes.
        graph_seed: draws graph and features.
    """

    num_nodes: int = 10_000
    average_degree: float = 10.0
    num_features: int = 64
    num_classes: int = 10
    homophily: float = 0.7
    degree_exponent: float = 2.5
    num_train: int | None = None
    num_val: int | None = None
    num_test: int | None = None
    graph_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        nodes = self.num_nodes
        check_at_least("dataset.num_nodes", nodes, 10)
        degree = self.average_degree
        check(
            0 < degree <= (nodes - 1) / 4,
            "dataset.average_degree",
            degree,
            f"must be above 0 and at most (num_nodes - 1) / 4 = {(nodes - 1) / 4:g}",
        )
        check_at_least("dataset.num_features", self.num_features, 1)
        classes = self.num_classes
        check(2 <= classes <= nodes, "dataset.num_classes", classes, "must be between 2 and num_nodes")
        check(0.0 <= self.homophily <= 1.0, "dataset.homophily", self.homophily, "must be between 0 and 1")
        check_above("dataset.degree_exponent", self.degree_exponent, 1)
        check_at_least("dataset.graph_seed", self.graph_seed, 0)
        sizes = (self.num_train, self.num_val, self.num_test)
        given = [size for size in sizes if size is not None]
        valid = "set num_train, num_val and num_test together, each 1 or more, at most num_nodes in all"
        check(len(given) in (0, 3) and all(size >= 1 for size in given), "dataset.num_train", self.num_train, valid)
        check(sum(given) <= nodes, "dataset.num_train", self.num_train, valid)


@dataclass
class FileConfig(DatasetConfig):
    """A graph of one's own.

    Args:
        path: file or folder with the graph.
        features: ``given`` in the file, the ``degree`` of each node (log(1 + in), log(1 + out)), or its in-degree
            ``one_hot`` in 64 columns.
    """

    path: str = MISSING
    features: str = "given"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.path not in ("", MISSING), "dataset.path", repr(self.path), "must be the file or folder of a graph")
        check_choice("dataset.features", self.features, FEATURES)
        if self.name == "file":  # so that tables tell two graphs apart
            self.name = f"file_{PurePath(self.path).name.split('.')[0]}"


# Of the datasets that need no files of their own; the names of the others are in NAMES.
DATASET_PREFIXES: dict[type[DatasetConfig], str] = {
    DigitsConfig: "digits",
    SyntheticConfig: "synthetic",
    FileConfig: "file",
}


def dataset_config(name: str) -> type[DatasetConfig]:
    """The class of the fields that a dataset has."""
    kinds = (kind for kind, prefix in DATASET_PREFIXES.items() if name.startswith(prefix))
    return next(kinds, DatasetConfig)
