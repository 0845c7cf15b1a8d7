"""Checkpoint to decoder: every tensor goes once, straight to where it will live.

On the CPU, weights already stored in the wanted precision stay mapped: the file is the memory. Others are
decoded a block of rows at a time into their final place, and the pages read are given back at once.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from ayllu.errors import MissingExtraError, NoSpaceError, UsageError

try:
    import torch
except ImportError as error:
    raise MissingExtraError("Running a model with torch", "torch") from error

import numpy as np
from torch import Tensor

from ayllu.machine_memory import available_memory
from ayllu.model.decoder import Decoder
from ayllu.model.parameters import parameter_shapes
from ayllu.progress import SILENT, Progress
from ayllu.weights.checkpoint import Checkpoint
from ayllu.weights.gguf_blocks import QuantisedTensor
from ayllu.weights.tensors import Array, JoinedTensor, PlainTensor, StoredTensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

BLOCK_ELEMENTS = 1 << 20
"""Numbers decoded per call. Smaller blocks meet more often at the interpreter's lock: loading 1.8 billion
parameters of Q4_K_M on 2 cores took 7.2 s with 2^17, 5.1 s with 2^18, 4.2 s with 2^20 and with 2^21."""


def choose_device(name: str) -> torch.device:
    """The device a setting means; 'auto' takes a GPU if there is one. Raises UsageError if it is absent."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps") if torch.backends.mps.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"There is no device {name!r}.", "Use auto, cpu, cuda, cuda:N or mps.") from error
    missing = (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()) or (
        device.type == "mps" and not torch.backends.mps.is_available()
    )
    if missing or device.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"Device {name!r} is not available on this machine.", "Use --device cpu.")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision a setting means. 'auto' is bfloat16 where the hardware multiplies it, else float32."""
    if name != "auto":
        if name not in DTYPES:
            raise UsageError(f"There is no precision {name!r}.", f"Use auto, {', '.join(DTYPES)}.")
        return DTYPES[name]
    if device.type != "cpu":
        return torch.bfloat16
    multiplies_bf16 = any(
        getattr(torch.cpu, check, bool)() for check in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )
    return torch.bfloat16 if multiplies_bf16 else torch.float32


def memory_bytes(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> int:
    """Bytes the weights take once loaded, file pages that stay mapped included."""
    elements = checkpoint.config.parameters
    if _stays_in_file(checkpoint, device):
        elements -= checkpoint.tensors[EMBEDDING].elements
    return elements * dtype.itemsize


def require_memory(needed: int, device: torch.device) -> None:
    """Refuse a load that cannot fit, before it starts. Raises NoSpaceError with the numbers."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    if free is None:
        return
    if needed > free:
        raise NoSpaceError(
            f"The model needs {needed / 1e9:.1f} GB of memory on {device}, {free / 1e9:.1f} GB is free.",
            "Use a smaller model (`ayllu list`) or --dtype bfloat16.",
        )


def load_decoder(
    checkpoint: Checkpoint,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    writable: bool = False,
    progress: Progress = SILENT,
) -> Decoder:
    """The checkpoint's network with its weights, in evaluation mode and without gradients.

    dtype None keeps each stored float precision, and takes bfloat16 for block-quantised tensors. Weights
    that stay mapped from the file must not be written to; pass writable=True to have copies.
    """
    device = torch.device(device)
    with torch.device("meta"):
        decoder = Decoder(checkpoint.config)
    tensors = {name: checkpoint.tensors[name] for name in parameter_shapes(checkpoint.config)}
    if not writable and _stays_in_file(checkpoint, device):
        decoder.embed_tokens = MappedEmbedding(tensors.pop(EMBEDDING), dtype or torch.bfloat16)
    total = sum(stored.nbytes for stored in tensors.values())
    state: dict[str, Tensor] = {}
    under_way: list[tuple[StoredTensor, list[Future[None]]]] = []
    with (
        progress.task(f"Loading {checkpoint.path.name}", total) as task,
        _one_torch_thread(),
        ThreadPoolExecutor(os.cpu_count() or 1) as pool,
    ):
        for name, stored in tensors.items():
            if isinstance(stored, PlainTensor):
                state[name] = _place_plain(stored, device, dtype, writable)
                task.advance(stored.nbytes)
            else:
                state[name], blocks = _decode_into_place(stored, device, dtype, pool)
                under_way.append((stored, blocks))
        for stored, blocks in under_way:
            for block in blocks:
                block.result()
            stored.release()
            task.advance(stored.nbytes)
    decoder.load_state_dict(state, assign=True)
    return decoder.eval().requires_grad_(False)


EMBEDDING = "embed_tokens.weight"


def _stays_in_file(checkpoint: Checkpoint, device: torch.device) -> bool:
    """Whether the embedding is read row by row from the file instead of being decoded whole.

    A token needs one of its rows. A tied table is also the head, of which every token needs all rows.
    """
    tied = checkpoint.config.tie_word_embeddings
    return device.type == "cpu" and not tied and isinstance(checkpoint.tensors[EMBEDDING], QuantisedTensor)


class MappedEmbedding(torch.nn.Module):
    """An embedding whose quantised rows stay in the mapped file and are decoded when a token needs them."""

    def __init__(self, stored: StoredTensor, dtype: torch.dtype) -> None:
        super().__init__()
        self._stored, self._dtype = stored, dtype

    def forward(self, tokens: Tensor) -> Tensor:
        """Rows [*B, D] of token ids [*B]."""
        rows = [self._stored.decode_rows(token, token + 1) for token in tokens.flatten().tolist()]
        embedded = torch.from_numpy(np.concatenate(rows)) if rows else torch.empty(0, self._stored.shape[-1])
        return embedded.to(self._dtype).view(*tokens.shape, self._stored.shape[-1])


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Blocks are converted in our own threads; torch's would only fight them for the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _place_plain(
    stored: PlainTensor, device: torch.device, dtype: torch.dtype | None, writable: bool
) -> Tensor:
    source = tensor_of(stored.array)
    wanted = dtype if dtype is not None and source.is_floating_point() else source.dtype
    placed = source.to(device=device, dtype=wanted, copy=writable)
    if placed.data_ptr() != source.data_ptr():
        stored.release()
    return placed


def _decode_into_place(
    stored: StoredTensor, device: torch.device, dtype: torch.dtype | None, pool: ThreadPoolExecutor
) -> tuple[Tensor, list[Future[None]]]:
    """The tensor where it will live, and the blocks that are still on their way into it."""
    native = torch.bfloat16
    if isinstance(stored, JoinedTensor) and isinstance(stored.parts[0], PlainTensor):
        native = tensor_of(stored.parts[0].array).dtype
    placed = torch.empty(stored.shape, dtype=dtype or native, device=device)
    _prefer_huge_pages(placed)
    flat = placed.view(-1, stored.shape[-1])
    rows_per_block = max(1, BLOCK_ELEMENTS // stored.shape[-1])

    def place_rows(start: int) -> None:
        stop = min(start + rows_per_block, stored.rows)
        decoded = _scratch((stop - start, stored.shape[-1]))
        stored.decode_rows_into(start, stop, decoded.numpy())
        flat[start:stop].copy_(decoded)

    starts = range(0, stored.rows, rows_per_block)
    return placed, [pool.submit(place_rows, start) for start in starts]


_thread = threading.local()


def _scratch(shape: tuple[int, int]) -> Tensor:
    """A float32 buffer of this thread's own, used again for every block: fresh memory costs page faults."""
    elements = shape[0] * shape[1]
    buffer: Tensor | None = getattr(_thread, "buffer", None)
    if buffer is None or buffer.numel() < elements:
        buffer = _thread.buffer = torch.empty(max(elements, BLOCK_ELEMENTS), dtype=torch.float32)
    return buffer[:elements].view(shape)


MADV_HUGEPAGE = 14
HUGE_PAGE_BYTES = 2 << 20


def _prefer_huge_pages(tensor: Tensor) -> None:
    """Ask Linux for 2 MiB pages under a large CPU tensor: fewer faults now, fewer address misses later."""
    if sys.platform != "linux" or tensor.device.type != "cpu" or tensor.nbytes < 2 * HUGE_PAGE_BYTES:
        return
    start = -(-tensor.data_ptr() // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    stop = (tensor.data_ptr() + tensor.nbytes) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    # Only advice: a kernel without huge pages answers with an error, and nothing is lost.
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), MADV_HUGEPAGE)


def tensor_of(array: Array) -> Tensor:
    """A torch view of a numpy array, with the float types that numpy itself does not have."""
    kinds = {
        "bfloat16": torch.bfloat16,
        "float8_e4m3fn": torch.float8_e4m3fn,
        "float8_e5m2": torch.float8_e5m2,
    }
    extended = kinds.get(array.dtype.name)
    with warnings.catch_warnings():
        # Mapped files are read-only, and torch warns that it cannot express that.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        if extended is None:
            return torch.from_numpy(array)
        plain = array.view("int16" if array.dtype.itemsize == 2 else "uint8")
        return torch.from_numpy(plain).view(extended)
