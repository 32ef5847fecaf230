"""What every loader does last: clean up edges, labels and splits, and check that they fit together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iexact_runner.config import DatasetConfig, FileConfig
from iexact_runner.data.dataset import NodeDataset
from iexact_runner.data.splits import Split, random_split
from iexact_runner.errors import DatasetError

# Columns whose moments are taken at once, for they are in float64.
STANDARDIZED_COLUMNS = 32


def prepare(
    config: DatasetConfig,
    *,
    x: Tensor,
    y: Tensor,
    edge_index: Tensor,
    split: Split | None,
    num_classes: int | None = None,
) -> NodeDataset:
    """Makes a dataset of what a library returned.

    Repeated edges are merged, self-loops stay as the source has them, and nodes without a label leave the split.

    Args:
        config: ``undirected``, ``standardize``, ``standardize_over`` and ``split_seed`` apply here.
        x: (N, D) features.
        y: (N,) or (N, 1) class indices, or (N, C) zeros and ones; -1 or NaN marks a missing label.
        edge_index: (2, E) node indices.
        split: the published train, validation and test indices, or None to draw 60/20/20.
        num_classes: as published; by default the largest label + 1.
    """
    _check_tensors(config, {"features": x, "labels": y, "edges": edge_index})
    if x.dim() != 2 or y.dim() not in (1, 2) or len(x) != len(y) or x.numel() == 0 or y.numel() == 0:
        raise _mismatch(config, f"features {tuple(x.shape)} and labels {tuple(y.shape)} disagree")
    x = x.float()
    infinite = ~torch.isfinite(x)
    if infinite.any():
        node, column = infinite.nonzero()[0].tolist()
        raise _mismatch(config, f"a feature is not finite: column {column} of node {node} is {x[node, column]}")
    y = y.squeeze(1) if y.dim() == 2 and y.size(1) == 1 else y
    missing = torch.isnan(y) | (y < 0)
    if y.dim() == 2:
        labelled = ~missing.any(dim=1)
        _check_values(config, y, labelled.unsqueeze(1) & (y != 0) & (y != 1), "0 or 1")
        y, classes = y.float(), y.size(1)
    else:
        labelled = ~missing
        _check_values(config, y, labelled & (y != y.floor()), "a whole number, or -1 where it is missing")
        if not (y[labelled] < len(y)).all():
            raise _mismatch(config, f"a label is beyond the {len(y)} classes that as many nodes can have")
        y = y.masked_fill(missing, -1).long()
        classes = int(y.max()) + 1
    if num_classes is not None and classes > num_classes:
        raise _mismatch(config, f"label {classes - 1} is beyond the {num_classes} classes")

    if split is None:
        split = random_split(labelled.nonzero().squeeze(1), config.split_seed)
    train, val, test = (_keep_labelled(config, nodes, labelled) for nodes in split)
    for name, nodes in (("train", train), ("validation", val), ("test", test)):
        if len(nodes) == 0:
            raise _mismatch(config, f"the {name} split has no labelled node")
    return NodeDataset(
        x=standardized(x, train, config) if config.standardize else x,
        y=y,
        edge_index=_merged_edges(config, edge_index, len(x)),
        train=train,
        val=val,
        test=test,
        num_classes=num_classes or classes,
    )


def _check_tensors(config: DatasetConfig, tensors: dict[str, Any]) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_complex():
            raise _mismatch(config, f"the {name} are missing, or no dense tensor of numbers")


def _check_values(config: DatasetConfig, y: Tensor, wrong: Tensor, valid: str) -> None:
    """Refuses labels (N,) or (N, C) where ``wrong`` is set."""
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        raise _mismatch(config, f"a label of node {place[0]} is {y[place].item():g}: must be {valid}")


def index_dtype(num_nodes: int) -> torch.dtype:
    """The smallest dtype that a sparse product takes: int32 halves the memory of the edges."""
    return torch.int32 if num_nodes <= torch.iinfo(torch.int32).max else torch.int64


def standardized(x: Tensor, train: Tensor, config: DatasetConfig) -> Tensor:
    """Features (N, D) of mean 0 and sample deviation 1 over all or the training nodes; a constant column is centred."""
    result = torch.empty_like(x)
    for own, columns in zip(
        result.split(STANDARDIZED_COLUMNS, dim=1), x.split(STANDARDIZED_COLUMNS, dim=1), strict=True
    ):
        rows = (columns if config.standardize_over == "all" else columns[train]).double()
        mean, std = rows.mean(dim=0), rows.std(dim=0, correction=min(1, len(rows) - 1))
        # A column of one repeated value has a standard deviation of rounding errors, not of exactly zero.
        constant = std <= 1e-7 * mean.abs()
        torch.div(columns - mean.float(), std.masked_fill(constant, 1.0).float(), out=own)
    return result


def _keep_labelled(config: DatasetConfig, nodes: Tensor, labelled: Tensor) -> Tensor:
    _check_range(config, nodes, len(labelled), "split")
    nodes = nodes.long().flatten()
    return nodes[labelled[nodes]]


def _merged_edges(config: DatasetConfig, edge_index: Tensor, num_nodes: int) -> Tensor:
    """Sorts by source, then target, and drops repeats; adds the reverse edges if the config asks."""
    if edge_index.dim() != 2 or len(edge_index) != 2:
        raise _mismatch(config, f"the edge list has shape {tuple(edge_index.shape)}")
    _check_range(config, edge_index, num_nodes, "edge list")
    source, target = edge_index.long()
    key = source * num_nodes + target
    if config.undirected:
        key = torch.cat([key, target * num_nodes + source])
    key = torch.unique(key)
    dtype = index_dtype(num_nodes)
    return torch.stack([(key // num_nodes).to(dtype), (key % num_nodes).to(dtype)])


def _check_range(config: DatasetConfig, index: Tensor, num_nodes: int, what: str) -> None:
    if not isinstance(index, Tensor) or index.is_floating_point() or index.is_complex():
        raise _mismatch(config, f"the {what} is not one of node numbers")
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < num_nodes:
        place = ((index < 0) | (index >= num_nodes)).nonzero()[0].tolist()
        reason = f"the {what} names node {int(index[tuple(place)])} of {num_nodes} in entry {place[-1]}"
        raise _mismatch(config, f"{reason}: must be 0 to {num_nodes - 1}")


def _mismatch(config: DatasetConfig, reason: str) -> DatasetError:
    if isinstance(config, FileConfig):
        return DatasetError(f"{config.path}: {reason}")
    return DatasetError(
        f"dataset {config.name} under dataset.root={config.root} is inconsistent: {reason}; "
        "copy or download its files again and delete the processed folder beside them"
    )
