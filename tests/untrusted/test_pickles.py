from __future__ import annotations

import collections
import io
import os
import pickle
import zipfile

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from iexact_runner.untrusted.pickles import RefusedPickle, check_torch_file, load_pickled


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def pickled(path, value, protocol=2):
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("dtype", ["float32", ">i4", "uint8", "bool"])
def test_arrays_and_matrices_are_read_as_pickle_reads_them(tmp_path, protocol, dtype):
    array = np.array([[0, 1, 2], [3, 0, 1]]).astype(dtype)
    for value in (array, np.asfortranarray(array), array.T):
        np.testing.assert_array_equal(load_pickled(pickled(tmp_path / "a", value, protocol)), value)
    matrix = sp.csr_matrix(array.astype("float32"))
    np.testing.assert_array_equal(load_pickled(pickled(tmp_path / "m", matrix, protocol)), matrix.toarray())


@pytest.mark.parametrize("protocol", range(6))
def test_graphs_are_read(tmp_path, protocol):
    graph = collections.defaultdict(list, {0: [1, 2], 5: []})
    assert load_pickled(pickled(tmp_path / "g", graph, protocol)) == {0: [1, 2], 5: []}


def test_names_of_older_versions_are_known(tmp_path):
    written = pickle.dumps(sp.csr_matrix(np.eye(2)), protocol=2)
    for new, old in ((b"scipy.sparse._csr", b"scipy.sparse.csr"), (b"numpy._core.multi", b"numpy.core.multi")):
        assert new in written
        written = written.replace(new, old)
    (tmp_path / "m").write_bytes(written)
    np.testing.assert_array_equal(load_pickled(tmp_path / "m"), np.eye(2))


def test_python_2_wrote_bytes_as_text_and_objects_through_copy_reg(tmp_path):
    text = b"ccopy_reg\n_reconstructor\n(cscipy.sparse.csr\ncsr_matrix\nc__builtin__\nobject\nNtR"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I%d\ntcnumpy\ndtype\n(S'%s'\n"
    array += b"I0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\nS'%s'\ntb"
    data = array % (1, b"f4", rb"\x00\x00\x80\xff")
    indices, indptr = array % (1, b"i4", rb"\x01\x00\x00\x00"), array % (2, b"i4", rb"\x00\x00\x00\x00\x01\x00\x00\x00")
    state = b"(dS'data'\n" + data + b"sS'indices'\n" + indices + b"sS'indptr'\n" + indptr + b"sS'_shape'\n(I1\nI2\ntsb."
    (tmp_path / "m").write_bytes(text + state)
    np.testing.assert_array_equal(load_pickled(tmp_path / "m"), [[0, -np.inf]])


@pytest.mark.parametrize("protocol", range(6))
def test_a_payload_is_named_and_not_run(tmp_path, protocol):
    marker = tmp_path / "ran"
    with pytest.raises(RefusedPickle, match=r"a pickle that names posix\.mkdir, which no such file needs"):
        load_pickled(pickled(tmp_path / "a", {"x": Payload(marker)}, protocol))
    assert not marker.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a pickle",
        b"cnumpy\nndarray\n(I99999999999\ntR.",  # an array of no content
        b"\x80\x02r\xff\xff\xff\x7f",  # a reference number that C would make room for
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",  # bytes without end
        pickle.dumps(np.array([{}], dtype=object)),
        pickle.dumps(np.array([(1, 2)], dtype="i4,i4")),
    ],
)
def test_damaged_pickles_are_errors_of_reading(tmp_path, data):
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(
        (ValueError, EOFError, TypeError, LookupError, AttributeError, OverflowError, pickle.PickleError)
    ):
        load_pickled(tmp_path / "a")


def saved(path, value):
    torch.save(value, path)
    return path


def rewritten(path, old, new):
    """A torch archive whose pickle says something else, with the checksums of that."""
    source = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
    with zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("data.pkl"):
                assert content.count(old) == 1
                content = content.replace(old, new)
            target.writestr(name, content)
    return path


TENSORS = {
    "a": torch.arange(1000),
    "b": [torch.ones(3, 4).T, torch.zeros(2, dtype=torch.bfloat16)],
    "n": (1, None, "x"),
}


def test_tensors_pass(tmp_path):
    check_torch_file(saved(tmp_path / "a.pt", TENSORS))
    check_torch_file(saved(tmp_path / "b.pt", {"state": torch.nn.Linear(3, 2).state_dict(), "view": torch.eye(3)[1]}))
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))])
    check_torch_file(saved(tmp_path / "c.pt", optimizer.state_dict()))


def test_payload_in_a_torch_file_is_named_and_not_run(tmp_path):
    path = saved(tmp_path / "a.pt", {"x": Payload(tmp_path / "ran")})
    with pytest.raises(RefusedPickle, match=r"posix\.mkdir"):
        check_torch_file(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b"M\xe8\x03tq\x07Q", b"J\x00\x00\x00\x7ftq\x07Q", "another size than its pickle says"),
        (b"QK\x00M\xe8\x03\x85", b"QK\x09M\xe8\x03\x85", "lies in a storage"),
        (b"K\x01\x85q\x09", b"K\x02\x85q\x09", "lies in a storage"),
        (b"M\xe8\x03\x85q\x08K\x01\x85", b"J\x00\x00\x00\x7f\x85q\x08K\x00\x85", "lies in a storage"),
    ],
    ids=["storage", "offset", "stride", "repeated"],
)
def test_a_tensor_lies_within_what_is_stored(tmp_path, old, new, reason):
    path = rewritten(saved(tmp_path / "a.pt", {"a": torch.arange(1000)}), old, new)
    with pytest.raises(ValueError, match=reason):
        check_torch_file(path)


def test_flipped_bit_of_a_tensor_is_noticed(tmp_path):
    path = saved(tmp_path / "a.pt", TENSORS)
    data = bytearray(path.read_bytes())
    data[data.index(torch.arange(1000).numpy().tobytes()) + 80] ^= 4
    path.write_bytes(bytes(data))
    assert torch.load(path, weights_only=True)["a"][10] == 14  # torch does not notice
    with pytest.raises(ValueError, match="bad checksum"):
        check_torch_file(path)


def test_compressed_members_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    with pytest.raises(ValueError, match="compressed members"):
        check_torch_file(tmp_path / "a.pt")
