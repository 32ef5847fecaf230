"""Tiny datasets in the layout of their libraries, and what damages their files or the records of a run."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import zipfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch

NODES, FEATURES, CLASSES = 620, 12, 4
# Where the files of a dataset lie below its root.
DATASETS = {
    "flickr": "Flickr",
    "amazon_computers": "Computers",
    "tolokers": "tolokers",
    "cora": "Cora",
    "arxiv": "ogbn_arxiv",
}

Damage = Callable[[Path, random.Random], None]


class Payload:
    """Makes the folder ``ran`` in the working folder when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def write_datasets(root: Path) -> None:
    """Writes the raw files of every dataset of ``DATASETS``."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(NODES, FEATURES)).astype(np.float32)
    y = rng.integers(CLASSES, size=NODES)
    edges = rng.integers(NODES, size=(2, 4 * NODES))
    raw = {name: root / folder / "raw" for name, folder in DATASETS.items()}
    for folder in raw.values():
        folder.mkdir(parents=True)
    adjacency = sp.csr_matrix((np.ones(edges.shape[1]), edges), shape=(NODES, NODES))
    attributes = sp.csr_matrix(x * (x > 0))
    np.savez(raw["flickr"] / "adj_full.npz", **_csr_parts(adjacency, ""))
    np.save(raw["flickr"] / "feats.npy", x)
    (raw["flickr"] / "class_map.json").write_text(json.dumps({str(node): int(label) for node, label in enumerate(y)}))
    parts = np.split(np.arange(NODES), [400, 500])
    names = ("tr", "va", "te")
    roles = {name: part.tolist() for name, part in zip(names, parts, strict=True)}
    (raw["flickr"] / "role.json").write_text(json.dumps(roles))
    file = raw["amazon_computers"] / "amazon_electronics_computers.npz"
    np.savez(file, **_csr_parts(adjacency, "adj_"), **_csr_parts(attributes, "attr_"), labels=y)
    masks = [np.isin(np.arange(NODES), part)[None].repeat(10, axis=0) for part in parts]
    keys = ("train_masks", "val_masks", "test_masks")
    split = dict(zip(keys, masks, strict=True))
    np.savez(raw["tolokers"] / "tolokers.npz", node_features=x, node_labels=y % 2, edges=edges.T, **split)
    _write_planetoid(raw["cora"], attributes, np.eye(CLASSES, dtype=np.int32)[y], edges)
    _write_ogb(raw["arxiv"].parent, x, y, edges, parts)


def _csr_parts(matrix: sp.csr_matrix, prefix: str) -> dict[str, Any]:
    names = ("data", "indices", "indptr", "shape")
    return {prefix + name: getattr(matrix, name) for name in names}


def _write_planetoid(raw: Path, x: sp.csr_matrix, y: Any, edges: Any) -> None:
    graph = defaultdict(list)
    for source, target in edges.T.tolist():
        graph[source].append(target)
    graph.update({node: [] for node in range(NODES) if node not in graph})
    parts = {"x": x[:20], "tx": x[600:], "allx": x[:600], "y": y[:20], "ty": y[600:], "ally": y[:600], "graph": graph}
    for name, part in parts.items():
        (raw / f"ind.cora.{name}").write_bytes(pickle.dumps(part, protocol=2))
    (raw / "ind.cora.test.index").write_text("".join(f"{node}\n" for node in range(600, NODES)))


def _write_ogb(folder: Path, x: Any, y: Any, edges: Any, parts: list[Any]) -> None:
    tables = {"edge": edges.T, "node-feat": x, "node-label": y, "node_year": y + 2000}
    tables |= {"num-node-list": np.array([NODES]), "num-edge-list": np.array([edges.shape[1]])}
    (folder / "split" / "time").mkdir(parents=True)
    files = {folder / "raw" / f"{name}.csv.gz": table for name, table in tables.items()}
    split = zip(("train", "valid", "test"), parts, strict=True)
    files |= {folder / "split" / "time" / f"{name}.csv.gz": part for name, part in split}
    for path, table in files.items():
        rows = "".join(",".join(map(str, np.atleast_1d(row))) + "\n" for row in table)
        path.write_bytes(gzip.compress(rows.encode()))


def damages_of(path: Path) -> list[Damage]:
    """What can be done to a file, of which half is particular to its format."""
    known = _FORMATS.get(path.suffix, [_payload] if path.name.startswith("ind.") else [])
    known = [_other_state] if path.name.startswith("checkpoint") else known
    return [*_ANY, *(known * (len(_ANY) // max(1, len(known)) or 1))]


def _truncated(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def _empty(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def _noise(path: Path, rng: random.Random) -> None:
    path.write_bytes(rng.randbytes(rng.choice([1, 100, 10_000])))


def _flipped(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 8, 64])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(data))


def _zeroed(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    start = rng.randrange(len(data))
    length = min(len(data) - start, rng.choice([1, 16, 512]))
    path.write_bytes(data[:start] + bytes(length) + data[start + length :])


def _exchanged(path: Path, rng: random.Random) -> None:
    others = [other for other in sorted(path.parent.iterdir()) if other != path and other.is_file()]
    path.write_bytes(rng.choice(others).read_bytes() if others else b"[]")


def _folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def _loop(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _device(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def _changed_array(array: Any, rng: random.Random) -> Any:
    extreme = float("nan") if array.dtype.kind == "f" else np.iinfo(array.dtype).max if array.dtype.kind in "iu" else 0
    spoilt = array.copy()
    spoilt.flat[rng.randrange(max(1, array.size))] = rng.choice([extreme, 0])
    objects = np.empty(array.shape, dtype=object)
    objects.flat[0] = Payload()
    return rng.choice(
        [
            spoilt,
            objects,
            array[:0],
            array[: len(array) // 2],
            array.reshape(-1),
            array[None],
            array.astype("U3"),
            array.T,
        ]
    )


def _other_array(path: Path, rng: random.Random) -> None:
    if path.suffix == ".npy":
        np.save(path, _changed_array(np.load(path), rng))
        return
    arrays = dict(np.load(path))
    name = rng.choice(sorted(arrays))
    if rng.random() < 0.2:
        del arrays[name]
    else:
        arrays[name] = _changed_array(arrays[name], rng)
    np.savez(path, **arrays)


def _lying_header(path: Path, rng: random.Random) -> None:
    """Says another shape or type than the content has."""
    source = path.read_bytes()
    digits = str(NODES).encode()
    lies = [b"9" * len(digits), b"9" * 30, b"-" + digits, b"1.5", b"(((("]

    def lie(content: bytes) -> bytes:
        return content.replace(rng.choice([digits, b"'<f4'", b"'<f8'", b"'<i8'"]), rng.choice([*lies, b"'|O'"]), 1)

    if path.suffix == ".npy":
        path.write_bytes(lie(source))
        return
    with zipfile.ZipFile(io.BytesIO(source)) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, lie(old.read(name)))


def _bomb(path: Path, rng: random.Random) -> None:
    """Half a gigabyte of zeros in a file of half a megabyte."""
    if path.suffix == ".gz":
        with gzip.open(path, "wb", compresslevel=1) as stream:
            for _ in range(512):
                stream.write(b"0" * 2**20)
        return
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("data.npy", "w") as file,
    ):
        np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (2**26,)})
        for _ in range(512):
            file.write(bytes(2**20))


JUNK: tuple[Any, ...] = (
    *(
        None,
        True,
        -1,
        0,
        2.5,
        10**30,
        float("nan"),
        float("inf"),
        "",
        "words",
        "[/red]",
        "[bold",
        "<script>",
        "\x1b[2J",
        "a\nb",
    ),
    *([], {}, [1, "a"], {"a": {"b": []}}, "x" * 10_000, "../../elsewhere", "\ud800"),
)


def _other_json(path: Path, rng: random.Random) -> None:
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    row = rng.randrange(len(lines))
    value = json.loads(lines[row])
    place = value
    while True:
        key = rng.choice(sorted(place) if isinstance(place, dict) else range(len(place)))
        if not isinstance(place[key], (dict, list)) or not place[key] or rng.random() < 0.15:
            break
        place = place[key]
    if rng.random() < 0.2:
        del place[key]
    else:
        place[key] = rng.choice(JUNK)
    lines[row] = json.dumps(value)
    path.write_text("\n".join(lines) + "\n")


def _nested_json(path: Path, rng: random.Random) -> None:
    depth = 100_000
    path.write_text(rng.choice(["[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth, "9" * 5000, "NaN"]))


def _other_table(path: Path, rng: random.Random) -> None:
    rows = gzip.decompress(path.read_bytes()).decode().splitlines()
    row = rng.randrange(len(rows))
    rows[row] = rng.choice(
        ["nan", "-1", "words", "9" * 30, "", "1,2,3,4,5,6,7,8,9,10,11,12,13,14", "0.5", '"', "1e400"]
    )
    if rng.random() < 0.2:
        rows = rows[:row]
    path.write_bytes(gzip.compress(("\n".join(rows) + "\n").encode()))


def _payload(path: Path, rng: random.Random) -> None:
    values = [
        Payload(),
        {"x": Payload()},
        [0],
        np.zeros(3),
        sp.csr_matrix(np.eye(3)),
        {1: "a"},
        {-5: [2]},
        {10**30: [1]},
    ]
    path.write_bytes(pickle.dumps(rng.choice(values), protocol=rng.randrange(6)))


def _other_tensors(path: Path, rng: random.Random) -> None:
    content = torch.load(path, weights_only=False)
    fields = content[0] if isinstance(content[0], dict) else content[0].to_dict()
    name = rng.choice(["x", "y", "edge_index"])
    tensor = fields[name]
    spoilt = tensor.clone().contiguous()
    spoilt.view(-1)[0] = float("nan") if tensor.is_floating_point() else 2**40
    one = tensor.flatten()[:1]
    others = [
        spoilt,
        tensor[:0],
        tensor.t() if tensor.dim() == 2 else tensor[None],
        one.expand(2**40),
        tensor.to_sparse(),
        tensor.bool(),
        "words",
        Payload(),
        None,
    ]
    fields[name] = rng.choice(others)
    torch.save((fields, *content[1:]), path)


def _other_state(path: Path, rng: random.Random) -> None:
    """A checkpoint with something else in it, and the digest of that."""
    head, _, data = path.read_bytes().partition(b"\n")
    state = torch.load(io.BytesIO(data), weights_only=True)
    name = rng.choice(sorted(state))
    state[name] = rng.choice([Payload(), torch.zeros(3), *JUNK])
    if rng.random() < 0.2:
        del state[name]
    content = io.BytesIO()
    torch.save(state, content)
    digest = hashlib.sha256(content.getvalue()).hexdigest().encode()
    path.write_bytes(head.rpartition(b" ")[0] + b" " + digest + b"\n" + content.getvalue())


def _other_yaml(path: Path, rng: random.Random) -> None:
    laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    laughs += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
    tag = "!!python/object/apply:os.mkdir [ran]\n"
    text = path.read_text()
    path.write_text(
        rng.choice(
            [laughs + text, f"model: {tag}{text}", "{" * 5000, text.replace("seed: 0", "seed: [a", 1), "a: b", tag]
        )
    )


_ANY: list[Damage] = [_truncated, _empty, _noise, _flipped, _flipped, _zeroed, _exchanged, _folder, _loop, _device]
_FORMATS: dict[str, list[Damage]] = {
    ".npz": [_other_array, _lying_header, _bomb],
    ".npy": [_other_array, _lying_header],
    ".json": [_other_json, _nested_json],
    ".jsonl": [_other_json, _nested_json],
    ".gz": [_other_table, _bomb],
    ".pt": [_other_tensors],
    ".yaml": [_other_yaml],
}


def copy(source: Path, target: Path) -> None:
    """A folder as it was, in the place of what is there."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, symlinks=True)
