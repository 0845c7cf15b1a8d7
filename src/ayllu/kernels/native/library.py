"""The binding of the native library: formats, memory and single kernels as Python calls.

A plain C interface through ctypes: nothing to compile against Python, and the interpreter's lock is released
during every call. `native_library()` loads it on first use.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ayllu.errors import NoSpaceError, UnsupportedError

Floats = NDArray[np.float32]

FORMATS = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("F32", "F16", "BF16"),
)
"""Encodings that are packed, by their GGUF names; the place is the number that formats.h gives them."""

FORMAT_CODES = {name: code for code, name in enumerate(FORMATS)}

INSTRUCTION_SETS = ("plain", "avx2", "avx512")

_FILE = {"win32": "ayllu_native.dll", "darwin": "libayllu_native.dylib"}.get(
    sys.platform, "libayllu_native.so"
)
_INTERFACE_VERSION = 1
_NO_MEMORY = 1


class PackJob(ctypes.Structure):
    """Stored rows and where their panels go."""

    _fields_ = [
        ("format", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("cols", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("source", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("packed", ctypes.c_void_p),
    ]


_C = ctypes
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ayllu_interface_version": (_C.c_int32, []),
    "ayllu_kernels_name": (_C.c_char_p, [_C.c_char_p]),
    "ayllu_allocate": (_C.c_void_p, [_C.c_int64]),
    "ayllu_free": (None, [_C.c_void_p, _C.c_int64]),
    "ayllu_packed_bytes": (_C.c_int64, [_C.c_int32] * 3),
    "ayllu_source_row_bytes": (_C.c_int64, [_C.c_int32] * 2),
    "ayllu_pack": (_C.c_int32, [_C.POINTER(PackJob), _C.c_int32, _C.c_int32]),
    "ayllu_linear": (
        _C.c_int32,
        [_C.c_char_p, *[_C.c_int32] * 3, _C.c_void_p, _C.c_void_p, _C.c_int32, _C.c_void_p],
    ),
    "ayllu_linear_swiglu": (
        _C.c_int32,
        [_C.c_char_p, *[_C.c_int32] * 3, *[_C.c_void_p] * 3, _C.c_int32, _C.c_void_p],
    ),
    "ayllu_unpack_rows": (_C.c_int32, [_C.c_char_p, *[_C.c_int32] * 3, _C.c_void_p, _C.c_void_p]),
    "ayllu_rms_norm": (
        _C.c_int32,
        [_C.c_char_p, _C.c_void_p, _C.c_void_p, _C.c_float, _C.c_int32, _C.c_int32, _C.c_void_p],
    ),
    "ayllu_rotate": (_C.c_int32, [_C.c_char_p, *[_C.c_void_p] * 3, *[_C.c_int32] * 3]),
    "ayllu_silu_multiply": (_C.c_int32, [_C.c_char_p, *[_C.c_void_p] * 2, _C.c_int32, _C.c_void_p]),
    "ayllu_merge": (_C.c_int32, [_C.c_char_p, *[_C.c_void_p] * 4, _C.c_int32]),
    "ayllu_decoder_new": (_C.c_void_p, [_C.c_void_p, _C.c_void_p, _C.c_char_p, _C.c_int32]),
    "ayllu_decoder_free": (None, [_C.c_void_p]),
    "ayllu_decoder_set_layer": (None, [_C.c_void_p, *[_C.c_int32] * 5]),
    "ayllu_decoder_set_matrix": (None, [_C.c_void_p, *[_C.c_int32] * 5, _C.c_void_p]),
    "ayllu_decoder_set_vector": (None, [_C.c_void_p, *[_C.c_int32] * 2, _C.c_void_p]),
    "ayllu_decoder_set_embedding_rows": (None, [_C.c_void_p, _C.c_int32, _C.c_void_p, _C.c_int64]),
    "ayllu_decoder_advise_experts": (None, [_C.c_void_p, _C.c_int32]),
    "ayllu_decoder_experts_read": (_C.c_int64, [_C.c_void_p]),
    "ayllu_decoder_make_cache": (
        _C.c_int32,
        [_C.c_void_p, _C.c_int32, _C.c_void_p, _C.c_int32, _C.c_int32],
    ),
    "ayllu_decoder_cache_bytes": (_C.c_int64, [_C.c_void_p]),
    "ayllu_decoder_add_adapter": (_C.c_int32, [_C.c_void_p, _C.c_void_p, _C.c_int32]),
    "ayllu_decoder_remove_adapter": (None, [_C.c_void_p, _C.c_int32]),
    "ayllu_decoder_forward": (
        _C.c_int32,
        [_C.c_void_p, _C.c_int32, *[_C.c_void_p] * 4, _C.c_int32, *[_C.c_void_p] * 3],
    ),
    "ayllu_decoder_logits": (_C.c_int32, [_C.c_void_p, _C.c_void_p, _C.c_int32, _C.c_void_p]),
    "ayllu_measure": (_C.c_double, [_C.c_char_p, _C.c_int32, _C.c_int64, _C.c_double]),
}


def native_is_built() -> bool:
    """Whether this installation has the library at all."""
    return (Path(__file__).parent / _FILE).exists()


@cache
def native_library() -> Any:
    """The loaded library. Raises UnsupportedError where ayllu was installed without it, or with another's."""
    path = Path(__file__).parent / _FILE
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        fits = library.ayllu_interface_version() == _INTERFACE_VERSION
    except (OSError, AttributeError):
        fits = False
    if not fits:
        raise UnsupportedError(
            f"The native CPU runner ({_FILE}) is missing or belongs to another version of ayllu.",
            "Install ayllu again with a C++ compiler at hand, or use --runner torch.",
        )
    return library


def _encoded(instruction_set: str | None) -> bytes | None:
    """An instruction set's name for the library; None means the best one."""
    return None if instruction_set is None else instruction_set.encode()


def kernels_name(wanted: str | None = None) -> str | None:
    """The instruction set that runs here: the best one, or `wanted`; None when that one does not run."""
    name = native_library().ayllu_kernels_name(_encoded(wanted))
    return None if name is None else str(name.decode())


def default_threads() -> int:
    """As many threads as this process may use processors."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def check(code: int, what: str) -> None:
    """Raises for a failed call: NoSpaceError without memory, else UnsupportedError."""
    if code == _NO_MEMORY:
        raise NoSpaceError(f"No memory is left for {what}.", "Use a smaller context or fewer slots.")
    if code:
        raise UnsupportedError(f"The native runner could not do this: {what} (code {code}).", "Report this.")


class NativeMemory:
    """Bytes outside Python's heap, in huge pages where the system has them. `array` views them."""

    def __init__(self, nbytes: int) -> None:
        self._library = native_library()
        self.nbytes = max(64, nbytes)
        address = self._library.ayllu_allocate(self.nbytes)
        if not address:
            raise NoSpaceError(f"No memory is left for {nbytes:,} bytes.", "Use a smaller model.")
        self.address: int = address

    @property
    def array(self) -> NDArray[np.uint8]:
        """A view [nbytes]; it must not outlive this object."""
        return np.ctypeslib.as_array((ctypes.c_uint8 * self.nbytes).from_address(self.address))

    def __del__(self) -> None:
        if getattr(self, "address", 0):
            self._library.ayllu_free(self.address, self.nbytes)


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix [rows, cols] in panels at `address`; `owner` keeps the memory. With experts, the address is
    the first one's."""

    encoding: str
    rows: int
    cols: int
    address: int
    owner: object

    @property
    def code(self) -> int:
        return FORMAT_CODES[self.encoding]

    @property
    def nbytes(self) -> int:
        return packed_bytes(self.encoding, self.rows, self.cols)


def packed_bytes(encoding: str, rows: int, cols: int) -> int:
    """Bytes of a packed matrix [rows, cols]."""
    return int(native_library().ayllu_packed_bytes(FORMAT_CODES[encoding], rows, cols))


def stored_row_bytes(encoding: str, cols: int) -> int | None:
    """Bytes of a row of `cols` numbers as files store it; None where they fill no whole blocks."""
    size = int(native_library().ayllu_source_row_bytes(FORMAT_CODES[encoding], cols))
    return None if size < 0 else size


def pack(jobs: Sequence[PackJob], threads: int) -> None:
    """Pack several matrices at once."""
    check(native_library().ayllu_pack((PackJob * len(jobs))(*jobs), len(jobs), threads), "packing")


def pack_matrix(encoding: str, stored: NDArray[np.uint8], cols: int, threads: int = 1) -> PackedMatrix:
    """Pack rows [rows, bytes of a row] of a stored encoding. Keeps a copy of its own.

    Raises UnsupportedError where the rows are not `cols` numbers in whole blocks.
    """
    rows, size = stored.shape
    if size != stored_row_bytes(encoding, cols):
        raise UnsupportedError(
            f"Rows of {size} bytes are not {cols} numbers in {encoding}.", "Use a file that is not damaged."
        )
    memory = NativeMemory(packed_bytes(encoding, rows, cols))
    pack(
        [
            PackJob(
                FORMAT_CODES[encoding], rows, cols, 0, stored.ctypes.data, stored.strides[0], memory.address
            )
        ],
        threads,
    )
    return PackedMatrix(encoding, rows, cols, memory.address, memory)


def linear(matrix: PackedMatrix, x: Floats, instruction_set: str | None = None) -> Floats:
    """x [n, cols] float32 -> x matrix' [n, rows] float32, inputs rounded as the decoder rounds them."""
    x = np.ascontiguousarray(x, np.float32)
    out = np.empty((x.shape[0], matrix.rows), np.float32)
    name = _encoded(instruction_set)
    shape = (matrix.code, matrix.rows, matrix.cols)
    code = native_library().ayllu_linear(
        name, *shape, matrix.address, x.ctypes.data, x.shape[0], out.ctypes.data
    )
    check(code, "a matrix product")
    return out


def linear_swiglu(
    gate: PackedMatrix, up: PackedMatrix, x: Floats, instruction_set: str | None = None
) -> Floats:
    """silu(x gate') * (x up') [n, rows], both matrices of one encoding and shape."""
    x = np.ascontiguousarray(x, np.float32)
    out = np.empty((x.shape[0], gate.rows), np.float32)
    name = _encoded(instruction_set)
    shape = (gate.code, gate.rows, gate.cols)
    code = native_library().ayllu_linear_swiglu(
        name, *shape, gate.address, up.address, x.ctypes.data, x.shape[0], out.ctypes.data
    )
    check(code, "a matrix product")
    return out


def unpacked(matrix: PackedMatrix, instruction_set: str | None = None) -> Floats:
    """The numbers of a packed matrix, float32 [rows, cols]."""
    out = np.empty((matrix.rows, matrix.cols), np.float32)
    name = _encoded(instruction_set)
    shape = (matrix.code, matrix.rows, matrix.cols)
    check(
        native_library().ayllu_unpack_rows(name, *shape, matrix.address, out.ctypes.data),
        "unpacking a matrix",
    )
    return out


def rms_norm(x: Floats, weight: Floats | None, eps: float, instruction_set: str | None = None) -> Floats:
    """x [n, cols] / sqrt(mean(x^2) + eps) * weight [cols]."""
    out = np.empty_like(x)
    given = None if weight is None else weight.ctypes.data
    name = _encoded(instruction_set)
    code = native_library().ayllu_rms_norm(name, x.ctypes.data, given, eps, *x.shape, out.ctypes.data)
    check(code, "a norm")
    return out


def rotated(
    heads: Floats, cos: Floats, sin: Floats, *, interleaved: bool, instruction_set: str | None = None
) -> Floats:
    """heads [n, head_dim] turned by angles whose cos and sin are [n, head_dim / 2]."""
    out = heads.copy()
    name = _encoded(instruction_set)
    code = native_library().ayllu_rotate(
        name, out.ctypes.data, cos.ctypes.data, sin.ctypes.data, *out.shape, interleaved
    )
    check(code, "a rotation")
    return out


def silu_multiply(gate: Floats, up: Floats, instruction_set: str | None = None) -> Floats:
    """silu(gate) * up, both [n]."""
    out = np.empty_like(gate)
    name = _encoded(instruction_set)
    code = native_library().ayllu_silu_multiply(
        name, gate.ctypes.data, up.ctypes.data, len(gate), out.ctypes.data
    )
    check(code, "silu")
    return out


@dataclass(frozen=True, eq=False)
class SoftmaxPart:
    """A softmax over some keys: a sum of values [dim, a multiple of 16] with weights 2^(score - best), which
    add up to `total`."""

    sums: Floats
    best: float
    total: float


def merged(into: SoftmaxPart, part: SoftmaxPart, instruction_set: str | None = None) -> SoftmaxPart:
    """The softmax over the keys of both."""
    sums = into.sums.copy()
    of = np.array([into.best, into.total], np.float32)
    of_part = np.array([part.best, part.total], np.float32)
    name = _encoded(instruction_set)
    code = native_library().ayllu_merge(
        name, sums.ctypes.data, of.ctypes.data, part.sums.ctypes.data, of_part.ctypes.data, len(sums)
    )
    check(code, "a softmax")
    return SoftmaxPart(sums, float(of[0]), float(of[1]))


def measure(what: str, threads: int, nbytes: int = 0, seconds: float = 0.2) -> float:
    """A ceiling of this machine: 'read' in bytes/s over `nbytes`, or 'float32', 'bfloat16', 'int8' in
    multiply-adds x 2 per second. Best of the repetitions that fit into `seconds`."""
    return float(native_library().ayllu_measure(what.encode(), threads, nbytes, seconds))
