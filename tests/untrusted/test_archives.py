from __future__ import annotations

import gzip
import io
import zipfile

import numpy as np
import pytest

from iexact_runner.untrusted import archives
from iexact_runner.untrusted.archives import check_csr, check_gzip, check_npy, check_npz, check_zip

CSR = {
    "data": np.ones(3),
    "indices": np.array([0, 2, 1]),
    "indptr": np.array([0, 2, 2, 3]),
    "shape": np.array([3, 4]),
}


def npy(array, **header):
    """The bytes of an array file, its header changed."""
    stream = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
    np.lib.format.write_array_header_1_0(stream, fields | header)
    return stream.getvalue() + array.tobytes()


def npz(path, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


def test_arrays_and_a_sparse_matrix_pass(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros((50, 3), np.float32), y=np.arange(50), words=np.array(["a"]))
    np.savez(tmp_path / "b.npz", **{f"attr_{name}": part for name, part in CSR.items()})
    np.save(tmp_path / "c.npy", np.asfortranarray(np.ones((3, 5))))
    check_npz(tmp_path / "a.npz")
    check_npz(tmp_path / "b.npz")
    check_npy(tmp_path / "c.npy")


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"shape": (10**15,)}, "says 8,000,000,000,000,128 bytes and has 152"),
        ({"shape": (2**62, 4)}, "says .* bytes and has 152"),
        ({"shape": (2,)}, "says 144 bytes and has 152"),
        ({"shape": (-3,)}, "shape that is none"),
        ({"shape": "three"}, "shape that is none"),
        ({"descr": "|O"}, "holds Python objects"),
        ({"descr": [("a", "|O"), ("b", "<i4")]}, "holds Python objects"),
        ({"descr": "no such type"}, "header that cannot be read"),
    ],
)
def test_header_that_lies_is_refused(tmp_path, header, reason):
    content = npy(np.ones(3), **header)
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        check_npy(tmp_path / "a.npy")
    with pytest.raises(ValueError, match=f"x.npy: .*{reason}"):
        check_npz(npz(tmp_path / "a.npz", x=content))


def test_objects_are_refused_without_being_unpickled(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match=r"x\.npy: holds Python objects, which are a pickle"):
        check_npz(tmp_path / "a.npz")


def test_bombs_are_refused_at_their_directory(tmp_path, monkeypatch):
    bomb = tmp_path / "a.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(3 * 2**20))
    packed = tmp_path / "a.csv.gz"
    packed.write_bytes(gzip.compress(bytes(3 * 2**20)))
    check_zip(bomb)
    check_gzip(packed)
    monkeypatch.setattr(archives, "FREE_BYTES", 2**20)
    for check, path in ((check_zip, bomb), (check_npz, bomb), (check_gzip, packed)):
        with pytest.raises(ValueError, match="bytes unpack to"):
            check(path)


def test_what_exceeds_the_memory_is_refused():
    with pytest.raises(ValueError, match="this machine has"):
        archives.check_memory(2**60)


def test_wrong_checksum_is_named(tmp_path):
    path = npz(tmp_path / "a.npz", x=npy(np.arange(50.0)))
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises((ValueError, zipfile.BadZipFile, zipfile.zlib.error)):
        check_npz(path)


@pytest.mark.parametrize(
    ("part", "value", "reason"),
    [
        ("indices", [0, 4, 1], "names column 4: must be 0 to 3"),
        ("indices", [0, -1, 1], "row 0 .* names column -1: must be 0 to 3"),
        ("indptr", [0, 3, 2, 3], "offsets"),
        ("indptr", [0, 2, 2, 9], "offsets"),
        ("indptr", [1, 2, 2, 3], "offsets"),
        ("indptr", [0, 2, 3], "offsets"),
        ("indices", [0, 2], "offsets"),
        ("indices", [0.0, 2.0, 1.0], "wrong types"),
        ("data", [[1.0, 2.0, 3.0]], "wrong dimensions"),
        ("shape", [3, 10**15], "this machine has"),
    ],
)
def test_csr_whose_parts_contradict_each_other_is_refused(part, value, reason):
    check_csr(CSR, dense=True)
    with pytest.raises(ValueError, match=reason):
        check_csr({**CSR, part: np.array(value)}, dense=True)
