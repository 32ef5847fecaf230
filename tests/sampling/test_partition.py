"""Partitions: balanced, fewer edges across than by chance, kept whole and checked when read."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from iexact_runner.data.graph import edges_of
from iexact_runner.errors import ConfigError
from iexact_runner.sampling.partition import FOLDER, edge_cut, find_partition
from iexact_runner.sampling.subgraph import Pattern

METHODS = ["label_propagation", "metis"]


@pytest.fixture(scope="module")
def communities():
    """Twenty communities of thirty nodes, joined by a few edges in one direction, with self-loops."""
    random = np.random.default_rng(0)
    group = np.repeat(np.arange(20), 30)
    inside = [random.choice(np.flatnonzero(group == one), size=(200, 2)) for one in range(20)]
    pairs = np.unique(np.concatenate([*inside, random.integers(600, size=(150, 2)), [[5, 5], [9, 9]]]), axis=0)
    return Pattern(edges_of(torch.from_numpy(pairs.T.copy()), 600))


def found(pattern, count, method, folder=None):
    if method == "metis":
        pytest.importorskip("pymetis")
    return find_partition(pattern, count, method=method, folder=folder)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [1, 2, 20, 77])
def test_parts_have_about_one_size_and_few_edges_between_them(communities, method, count):
    result = found(communities, count, method)
    sizes = np.bincount(result.parts, minlength=count)
    assert result.parts.dtype == np.int32 and len(sizes) == count
    assert sizes.max() <= 1.5 * 600 / count + 1
    assert result.edge_cut == edge_cut(communities, result.parts)
    by_chance = edge_cut(communities, np.random.default_rng(1).permutation(600) * count // 600)
    assert result.edge_cut < (0.75 * by_chance if count > 1 else 1e-9)
    if count == 20:
        assert result.edge_cut < 0.3


@pytest.mark.parametrize("method", METHODS)
def test_as_many_parts_as_nodes_and_no_more(communities, method):
    found(communities, 600, method)
    with pytest.raises(ConfigError, match="sampler.parts=601: must be at most the 600 nodes"):
        found(communities, 601, method)


def test_edge_cut_is_the_share_of_edges_between_parts():
    pattern = Pattern(edges_of(torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]]), 4))
    assert edge_cut(pattern, np.array([0, 0, 1, 1])) == 0.5


def test_a_partition_is_read_again_and_only_for_the_same_graph_and_options(communities, tmp_path, monkeypatch):
    first = find_partition(communities, 20, method="label_propagation", folder=tmp_path)
    (path,) = (tmp_path / FOLDER).iterdir()

    def fail(*_):
        raise AssertionError("searched again")

    monkeypatch.setattr("iexact_runner.sampling.partition._label_propagation", fail)
    again = find_partition(communities, 20, method="label_propagation", folder=tmp_path)
    assert np.array_equal(first.parts, again.parts) and first.edge_cut == again.edge_cut
    with pytest.raises(AssertionError):
        find_partition(communities, 19, method="label_propagation", folder=tmp_path)
    other = Pattern(edges_of(torch.tensor([[0], [1]]), 600))
    with pytest.raises(AssertionError):
        find_partition(other, 20, method="label_propagation", folder=tmp_path)
    assert list((tmp_path / FOLDER).iterdir()) == [path]


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "other"])
def test_a_damaged_file_is_told_of_and_replaced(communities, tmp_path, damage, caplog):
    first = find_partition(communities, 20, method="label_propagation", folder=tmp_path)
    (path,) = (tmp_path / FOLDER).iterdir()
    whole = path.read_bytes()
    path.write_bytes({
        "cut": whole[:-100],
        "flipped": whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:],
        "text": b"hello",
        "other": whole.partition(b"\n")[2],
    }[damage])  # fmt: skip
    with caplog.at_level(logging.WARNING):
        again = find_partition(communities, 20, method="label_propagation", folder=tmp_path)
    assert "the partition is found anew" in caplog.text
    assert np.array_equal(first.parts, again.parts)
    assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_written_costs_only_the_next_search(communities, tmp_path, caplog):
    (tmp_path / FOLDER).write_text("a file")
    with caplog.at_level(logging.WARNING):
        result = find_partition(communities, 20, method="label_propagation", folder=tmp_path)
    assert len(result.parts) == 600 and "the partition is not kept" in caplog.text


def test_metis_is_asked_for_by_name_where_it_is_missing(communities, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"sampler.partition=metis: needs pymetis: pip install"):
        find_partition(communities, 20, method="metis", folder=None)
    assert find_partition(communities, 20, method="auto", folder=None).method == "label_propagation"
