"""A graph in parts on disk is the graph in memory; what is damaged, or of another run, is told in a line."""

from __future__ import annotations

import json
import shutil
import zipfile

import numpy as np
import pytest
import torch
from rich.console import Console

from conftest import tiny_dataset
from iexact_runner.cli import compose_config
from iexact_runner.data.part_files import GRAPH, PartFolder, part_path, write_parts
from iexact_runner.data.parts import OrderedGraph
from iexact_runner.data.sparse import CSR
from iexact_runner.errors import ConfigError, DatasetError
from iexact_runner.parallel.team import Team
from iexact_runner.sampling.parallel import in_parts, read_parts
from iexact_runner.tasks import partition
from parallel.processes import in_processes
from parallel.test_gradients import steps
from parallel.test_runs import ended, records, start

CONFIG = ("dataset=digits", "parallel=graph", "parallel.partition=label_propagation", "parallel.parts=3")
GRAPHS = {
    "symmetric": tiny_dataset(nodes=401),
    "directed": tiny_dataset(nodes=401, symmetric=False),
    "multilabel": tiny_dataset(nodes=401, multilabel=True),
}


def written(dataset, folder, *overrides):
    """A graph in parts, in memory and in a folder, and the configuration that reads it."""
    config = compose_config(*CONFIG, *overrides)
    graph = in_parts(dataset, config, Team())
    parts = list(write_parts(graph, folder, config.dataset))
    config.parallel.folder = str(folder)
    return graph, config, parts


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound") / "parts"
    written(GRAPHS["symmetric"], folder)
    return folder


def tensors(rows):
    edges = [rows.sources] + ([] if rows.targets is None else [rows.targets])
    return [rows.x, rows.y, *rows.splits, *(part for csr in edges for part in csr.tensors())]


@pytest.mark.parametrize("name", GRAPHS)
def test_files_hold_the_rows_of_each_run_of_parts(name, tmp_path):
    graph, config, parts = written(GRAPHS[name], tmp_path / "parts")
    folder = read_parts(config, Team())
    assert folder.facts == graph.facts and folder.facts.symmetric == (name != "directed")
    assert sum(part["nodes"] for part in parts) == 401
    assert sum(part["edges"] for part in parts) == GRAPHS[name].edge_index.size(1)
    for first, last in ((0, 1), (1, 3), (0, 3)):
        expected, found = (tensors(source.rows(first, last)) for source in (graph, folder))
        assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))


def test_the_rows_of_all_parts_are_the_graph_in_another_order():
    dataset = GRAPHS["directed"]
    order = torch.randperm(401, generator=torch.Generator().manual_seed(0))
    rows = OrderedGraph(dataset, order, (0, 100, 401)).rows(0, 2)
    assert torch.equal(rows.x, dataset.x[order]) and torch.equal(
        order[rows.splits[0]].sort().values, dataset.train.sort().values
    )
    dense = torch.zeros(401, 401)
    dense[dataset.edge_index[1].long(), dataset.edge_index[0].long()] = 1
    dense = dense[order][:, order]
    assert torch.equal(rows.sources.tensor().to_dense(), dense)
    assert torch.equal(rows.targets.tensor().to_dense(), dense.T)


@pytest.mark.parametrize("name", ["symmetric", "directed"])
@pytest.mark.parametrize("model", ["sage", "gcn", "gat"])
def test_gradients_are_those_of_the_graph_in_memory_to_the_last_bit(model, name, tmp_path):
    dataset = GRAPHS[name]
    written(dataset, tmp_path / "parts", "compression=lowrank")
    overrides = [f"model={model}", "compression=lowrank", "parallel.parts=3"]
    memory = in_processes(2, steps, dataset, overrides)
    files = in_processes(2, steps, None, [*overrides, f"parallel.folder={tmp_path / 'parts'}"])
    for expected, found in zip(memory, files, strict=True):
        assert all(np.array_equal(*pair) for pair in zip(expected[1], found[1], strict=True))
        assert expected[2] == found[2] and all(
            expected[3][name] == found[3][name] for name in ("nodes", "halo", "edges")
        )


def test_a_command_writes_the_parts_and_others_train_on_them(tmp_path):
    fields = ("parallel=graph", "parallel.parts=4", "parallel.partition=label_propagation", "parallel.folder=parts")
    ((status, shown, error),) = ended(start(tmp_path, 1, "task=partition", "output_dir=made", fields=fields))
    assert status == 0, error
    assert "4 parts by label_propagation" in shown and "written to parts" in shown
    (folder,) = (tmp_path / "made").iterdir()
    record = json.loads((folder / "summary.json").read_text())["parallel"]
    assert len(record["written"]) == 4 and record["peak_resident_mib"] > 100
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == [
        GRAPH,
        *(f"part_{number:05d}.npz" for number in range(4)),
    ]
    results = ended(start(tmp_path, 2, "output_dir=from_files", fields=("parallel=graph", "parallel.folder=parts")))
    assert [result[0] for result in results] == [0, 0], results
    summary, lines = records(next((tmp_path / "from_files").iterdir()))
    assert len(lines) == 4 and summary["parallel"]["parts"] == 4
    ranks = summary["parallel"]["ranks"]
    assert all(rank["peak_resident_mib"] > 0 and rank["loading_peak_resident_mib"] > 0 for rank in ranks)
    results = ended(start(tmp_path, 2, "task=partition", "parallel.folder=new", fields=fields[:3]))
    assert results[0][0] and "task=partition: works in one process, and 2 were started" in results[0][2]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task=partition"], "parallel.folder={folder}: has a graph already"),
        (["task=partition", "parallel.parts=null"], "parallel.parts=null: task=partition writes a graph in parts"),
        (["task=partition", "parallel.folder=null"], "parallel.folder=null: task=partition writes a graph in parts"),
        (["task=partition", "parallel=none"], "task=partition: writes the parts of parallel=graph"),
        (["parallel.folder=nowhere"], "parallel.folder=nowhere: has no graph.json"),
        (["parallel.folder=''"], "parallel.folder='': must be a folder, or null"),
        (["parallel.parts=4"], "parallel.parts=4: {folder} has 3; use null"),
        (["dataset.split_seed=1"], "dataset.split_seed=1: {folder} was written for dataset.split_seed=0"),
        (
            ["compression=iexact", "compression.col_size=100"],
            "compression.col_size=100: needs parts of whole multiples",
        ),
    ],
)
def test_what_does_not_fit_the_folder_is_told_before_anything_runs(overrides, message, sound):
    named = {override.partition("=")[0] for override in overrides}
    fields = [field for field in (*CONFIG, f"parallel.folder={sound}") if field.partition("=")[0] not in named]
    if "parallel" in named:
        fields = fields[:1]
    with pytest.raises(ConfigError) as raised:
        config = compose_config(*fields, *overrides)
        if config.task == "partition":
            partition.run(config, Console(quiet=True), Team())
        read_parts(config, Team())
    assert str(raised.value).startswith(message.format(folder=sound))


def test_more_processes_than_parts_are_told(sound, monkeypatch):
    monkeypatch.setattr(Team, "agree", lambda team, **values: None)
    fields = [field for field in CONFIG if not field.startswith("parallel.parts")]
    config = compose_config(*fields, f"parallel.folder={sound}", "parallel.parts=null")
    assert read_parts(config, Team(size=3)).facts.num_parts == 3
    with pytest.raises(ConfigError, match="^parallel.parts=3: must be at least the number of processes, 4$"):
        read_parts(config, Team(size=4))


def cut_short(folder):
    path = part_path(folder, 1)
    path.write_bytes(path.read_bytes()[:-100])


def flipped(folder):
    path = part_path(folder, 1)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def changed(**arrays):
    def change(folder):
        path = part_path(folder, 1)
        with np.load(path) as found:
            held = dict(found)
        held |= {name: make(held[name]) for name, make in arrays.items()}
        np.savez(path, **held)

    return change


def rewritten(change):
    def rewrite(folder):
        record = json.loads((folder / GRAPH).read_text())
        change(record)
        (folder / GRAPH).write_text(json.dumps(record))

    return rewrite


def without_labels(folder):
    path = part_path(folder, 1)
    with np.load(path) as found:
        np.savez(path, **{name: found[name] for name in found.files if name != "y"})


DAMAGES = {
    "missing": lambda folder: part_path(folder, 1).unlink(),
    "cut short": cut_short,
    "a bit flipped": flipped,
    "a folder": lambda folder: (part_path(folder, 1).unlink(), part_path(folder, 1).mkdir()),
    "no archive": lambda folder: part_path(folder, 1).write_bytes(b"nothing"),
    "without labels": without_labels,
    "fewer rows": changed(x=lambda x: x[:-1]),
    "doubles": changed(x=lambda x: x.astype(np.float64)),
    "no class": changed(y=lambda y: y + 1000),
    "a node beyond": changed(sources_columns=lambda columns: columns + 401),
    "a node below": changed(train=lambda nodes: nodes - 1000),
    "offsets beyond": changed(sources_offsets=lambda offsets: offsets * 2),
    "offsets that fall": changed(sources_offsets=lambda offsets: np.r_[0, offsets[-1], offsets[2:]]),
    "objects": changed(y=lambda y: y.astype(object)),
    "cuts that fall": rewritten(lambda record: record["facts"].update(cuts=[0, 200, 100, 401])),
    "cuts of text": rewritten(lambda record: record["facts"].update(cuts=["0", "401"])),
    "no facts": rewritten(lambda record: record.pop("facts")),
    "more facts": rewritten(lambda record: record["facts"].update(more=1)),
    "another format": rewritten(lambda record: record.update(format=2)),
    "no JSON": lambda folder: (folder / GRAPH).write_text("{"),
    "a list": lambda folder: (folder / GRAPH).write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_line_that_names_the_file(damage, sound, tmp_path):
    folder = tmp_path / "parts"
    shutil.copytree(sound, folder)
    DAMAGES[damage](folder)
    config = compose_config(*CONFIG)
    with pytest.raises(DatasetError) as raised:
        PartFolder(folder, config.dataset).rows(0, 3)
    message = str(raised.value)
    assert message.startswith(str(folder)) and message.endswith("write it again with task=partition")
    assert "\n" not in message


def test_an_archive_that_unpacks_to_more_than_it_can_mean_is_refused(sound, tmp_path):
    folder = tmp_path / "parts"
    shutil.copytree(sound, folder)
    with zipfile.ZipFile(part_path(folder, 1), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", bytes(300 << 20))
    with pytest.raises(DatasetError, match="unpack to"):
        PartFolder(folder, compose_config(*CONFIG).dataset).rows(1, 2)


def test_a_folder_that_was_not_written_to_its_end_does_not_count(tmp_path):
    config = compose_config(*CONFIG)
    writing = write_parts(in_parts(GRAPHS["symmetric"], config, Team()), tmp_path / "parts", config.dataset)
    next(writing)
    writing.close()
    with pytest.raises(ConfigError, match=r"has no graph\.json"):
        PartFolder(tmp_path / "parts", config.dataset)
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["part_00000.npz"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"parallel\.folder=.*cannot be written"):
        list(write_parts(in_parts(GRAPHS["symmetric"], config, Team()), tmp_path / "file", config.dataset))


def test_a_diagonal_has_one_entry_a_row():
    dense = (torch.rand(7, 9, generator=torch.Generator().manual_seed(0)) < 0.4).float()
    offsets = torch.cat([torch.zeros(1), dense.sum(1).cumsum(0)]).int()
    matrix = CSR(offsets, dense.nonzero()[:, 1].int())
    found = matrix.with_diagonal(first=2)
    for row in range(7):
        dense[row, row + 2] = 1
    assert torch.equal(found.columns, dense.nonzero()[:, 1].int()) and found.columns.dtype == torch.int32
    assert found.offsets.diff().tolist() == dense.sum(1).int().tolist() and found.offsets.dtype == torch.int32
