"""Pickles read without running anything: what a file names is a stand-in here that keeps what it is given."""

from __future__ import annotations

import io
import math
import pickle
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
from scipy.sparse import csr_matrix

from iexact_runner.untrusted.archives import Array, check_csr

# Modules as numpy and SciPy have called them over the years.
_ARRAYS = frozenset(
    {
        *(f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")),
        *(f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")),
        *(f"scipy.sparse.{module}.csr_matrix" for module in ("csr", "_csr")),
        "numpy.ndarray",
        "numpy.dtype",
        "collections.defaultdict",
        "collections.OrderedDict",
        "builtins.list",
        "builtins.object",
        "builtins.bytes",
        "copyreg._reconstructor",
        "_codecs.encode",
    }
)
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
# Storage classes of torch.save, and the bytes of an element.
_STORAGES = {
    "torch.DoubleStorage": 8,
    "torch.FloatStorage": 4,
    "torch.HalfStorage": 2,
    "torch.BFloat16Storage": 2,
    "torch.LongStorage": 8,
    "torch.IntStorage": 4,
    "torch.ShortStorage": 2,
    "torch.CharStorage": 1,
    "torch.ByteStorage": 1,
    "torch.BoolStorage": 1,
    "torch.storage.UntypedStorage": 1,
}
_REBUILD = "torch._utils._rebuild_tensor_v2"
_TENSORS = frozenset({*_STORAGES, _REBUILD, "collections.OrderedDict"})
# What a pickle that contradicts itself raises.
_SPOILT = (EOFError, TypeError, LookupError, AttributeError, OverflowError, NotImplementedError)
_PLAIN_TYPE = re.compile(r"[biuf][1248]")


class RefusedPickle(ValueError):
    """A pickle names what no such file needs."""


class _StandIn:
    """Keeps the arguments and the state that a pickle gives it."""

    name = ""
    args: tuple[Any, ...]
    state: Any = None

    def __new__(cls, *args: Any) -> Self:
        self = object.__new__(cls)
        self.args = args
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Mapping(dict[Any, Any]):
    """Any kind of dictionary, empty at first."""

    def __init__(self, *args: Any) -> None:
        super().__init__()


# In Python, because the one in C allocates as many places for references as a file asks for.
class _Reader(pickle._Unpickler):
    """Reads a pickle into stand-ins.

    Args:
        data: the pickle.
        allowed: full names that it may use.
        records: members of the torch archive it is in, and their sizes.
    """

    def __init__(self, data: bytes, allowed: Iterable[str], records: dict[str, int] | None = None) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")
        self._allowed = frozenset(allowed)
        self._records = records
        self._classes: dict[str, type] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{_PYTHON_2.get(module, module)}.{name}"
        if full not in self._allowed:
            raise RefusedPickle(f"a pickle that names {full}, which no such file needs")
        if full in ("collections.defaultdict", "collections.OrderedDict"):
            return _Mapping
        kind = _Tensor if full == _REBUILD else _StandIn
        return self._classes.setdefault(full, type(name, (kind,), {"name": full}))

    def persistent_load(self, pid: Any) -> Any:
        """A storage, as its number of elements; torch would believe it."""
        if self._records is None or not isinstance(pid, tuple) or len(pid) != 5:
            raise pickle.UnpicklingError("a reference to outside the pickle")
        _, kind, key, _, count = pid
        if not isinstance(count, int) or self._records.get(f"data/{key}") != count * _STORAGES[kind.name]:
            raise ValueError(f"storage {key} has another size than its pickle says")
        return count


class _Tensor(_StandIn):
    """A tensor of a torch archive, which must lie within its storage."""

    def __new__(cls, *args: Any) -> Self:
        count, offset, size, stride = args[:4]
        if not all(isinstance(number, int) and number >= 0 for number in (count, offset, *size, *stride)):
            raise ValueError("a tensor has sizes that are none")
        last = offset + sum((extent - 1) * step for extent, step in zip(size, stride, strict=True))
        elements = math.prod(size)
        # More elements than are stored are one element many times over, and would be as many on the first use.
        if elements and (last >= count or elements > count):
            raise ValueError(f"a tensor of {elements:,} elements says it lies in a storage of {count:,}")
        return super().__new__(cls, *args)


def check_torch_file(file: Path | IO[bytes], classes: Iterable[str] = ()) -> None:
    """Refuses a file of ``torch.save`` that is damaged, or says anything but tensors in dictionaries, lists and tuples.

    Checksums are compared too, which ``torch.load`` does not do.

    Args:
        file: its path or its content.
        classes: full names that it may use beside those of tensors.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("has compressed members")
            sizes = {member.filename.partition("/")[2]: member.file_size for member in archive.infolist()}
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(pickles) != 1 or len(sizes) < len(archive.namelist()):
                raise ValueError("is not a file of torch.save")
            broken = archive.testzip()
            if broken is not None:
                raise ValueError(f"bad checksum of {broken}")
            _Reader(archive.read(pickles[0]), _TENSORS | set(classes), sizes).load()
    except (zipfile.BadZipFile, pickle.UnpicklingError, *_SPOILT) as error:
        raise ValueError(str(error) or type(error).__name__) from error


def load_pickled(path: Path) -> Any:
    """What a pickle of arrays, CSR matrices, dictionaries and lists holds.

    Returns:
        An (..., ) array, a dense (rows, columns) matrix, or what plain Python objects it holds.
    """
    data = path.read_bytes()
    return _plain(_Reader(data, _ARRAYS).load(), limit=len(data))


def _plain(value: Any, *, limit: int) -> Any:
    if not isinstance(value, _StandIn):
        return value
    if _kind(value) == "csr_matrix":
        return _dense(value, limit=limit)
    return _array(value, limit=limit)


def _kind(value: _StandIn) -> str:
    named = value.args[0] if value.name == "copyreg._reconstructor" and value.args else type(value)
    return str(getattr(named, "__name__", ""))


def _dense(matrix: _StandIn, *, limit: int) -> Array:
    state = matrix.state
    shape = state.get("_shape", state.get("shape"))
    parts = {name: _array(state[name], limit=limit) for name in ("data", "indices", "indptr")}
    check_csr({**parts, "shape": np.array(shape, dtype=np.int64)}, dense=True)
    dense: Array = csr_matrix((parts["data"], parts["indices"], parts["indptr"]), shape).toarray()
    return dense


def _array(value: Any, *, limit: int) -> Array:
    if not isinstance(value, _StandIn):
        raise ValueError(f"holds a {type(value).__name__} in the place of an array")
    if _kind(value) == "_frombuffer":
        raw, dtype, shape, order = value.args
    elif _kind(value) == "_reconstruct":
        _, shape, dtype, fortran, raw = value.state
        order = "F" if fortran else "C"
    else:
        raise ValueError(f"holds a {_kind(value)} in the place of an array")
    if not isinstance(dtype, _StandIn) or _kind(dtype) != "dtype" or not _PLAIN_TYPE.fullmatch(str(dtype.args[0])):
        raise ValueError("holds an array of something else than numbers")
    byte_order = dtype.state[1] if dtype.state and dtype.state[1] in ("<", ">") else "="
    content = _raw(raw)
    if len(content) > limit:
        raise ValueError("holds an array longer than the file")
    return np.frombuffer(content, np.dtype(dtype.args[0]).newbyteorder(byte_order)).reshape(shape, order=order)


def _raw(value: Any) -> bytes:
    if isinstance(value, _StandIn) and _kind(value) in ("encode", "bytes"):
        value = value.args[0] if value.args else b""
    if isinstance(value, str):  # bytes of Python 2
        return value.encode("latin1")
    return bytes(memoryview(value))
