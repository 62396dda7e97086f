"""Reads checkpoint files tensor by tensor, never holding a model; `shards` writes them.

Safetensors files are a JSON header and raw bytes, so a tensor is read by its offset. They are
not mapped into memory: mapped pages would count as used. Legacy `.bin` files go through torch's `weights_only=True`.
"""

import json
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import torch
from safetensors import SafetensorError, safe_open


# Safetensors' names. Weights are floats; others are masks and counters of older checkpoints, or quantized weights.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

COPY_BYTES = 8 << 20  # the unit in which unchanged tensors pass from file to file
CHECK_BYTES = 1 << 18  # the same where they are checked on the way: small enough for the processor's cache

# Reports bytes as they pass.
Advance = Callable[[int], None]
# Looks at a part of a tensor, flat, as it passes; raises to stop.
Check = Callable[[torch.Tensor], None]


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint, before its data is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Source(Protocol):
    """Named tensors that can be read one at a time."""

    where: str
    entries: dict[str, Entry]

    def read(self, name: str) -> torch.Tensor: ...


class StateDictSource:
    """The tensors of a model in memory."""

    def __init__(self, state_dict: Mapping[str, torch.Tensor], where: str):
        self.where = where
        self.state_dict = state_dict
        self.entries = {name: Entry(tensor.dtype, tuple(tensor.shape)) for name, tensor in state_dict.items()}

    def read(self, name: str) -> torch.Tensor:
        return self.state_dict[name].detach()


class SafetensorsSource:
    """The tensors of one or more safetensors files."""

    def __init__(self, folder: Path, shards: Mapping[Path, Iterable[str] | None]):
        self.where = str(folder)
        self.entries: dict[str, Entry] = {}
        self.places: dict[str, tuple[Path, int]] = {}  # file, and offset of the first byte
        for path, wanted in shards.items():
            self._open(path, wanted)

    def _open(self, path: Path, wanted: Iterable[str] | None) -> None:
        try:
            with safe_open(path, framework="pt"):  # checks that the header is sound and the file complete
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is missing or broken: {error}") from error
        with open(path, "rb") as file:
            start = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(start))
        for name in header.keys() - {"__metadata__"} if wanted is None else wanted:
            if name not in header:
                raise ValueError(f"{path} lacks {name}, which the index says it holds")
            if header[name]["dtype"] not in DTYPES:
                raise ValueError(
                    f"{path}: {name} has dtype {header[name]['dtype']}, which torch does not have; "
                    "use a checkpoint that is not quantized"
                )
            self.entries[name] = Entry(DTYPES[header[name]["dtype"]], tuple(header[name]["shape"]))
            self.places[name] = (path, 8 + start + header[name]["data_offsets"][0])

    def read(self, name: str) -> torch.Tensor:
        entry, (path, offset) = self.entries[name], self.places[name]
        data = torch.empty(entry.size, dtype=torch.uint8)
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            read_exactly(file, data.numpy().data, path)
        return data.view(entry.dtype).view(entry.shape)

    def copy(self, name: str, target: BinaryIO, advance: Advance, check: Check | None = None) -> None:
        """Passes a tensor's bytes to a file as they are; `check` sees them part by part."""
        entry, (path, offset) = self.entries[name], self.places[name]
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            if check is None:
                copy_bytes(file, target, entry.size, path, advance)
            else:
                copy_checked(file, target, entry, path, advance, check)


class BinSource:
    """The tensors of legacy `pytorch_model.bin` files; mapped where the file's format allows it."""

    def __init__(self, folder: Path, shards: Mapping[Path, Iterable[str] | None]):
        self.where = str(folder)
        self.entries: dict[str, Entry] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        for path, wanted in shards.items():
            state_dict = self._load(path)
            for name in state_dict if wanted is None else wanted:
                if name not in state_dict:
                    raise ValueError(f"{path} lacks {name}, which the index says it holds")
                self.tensors[name] = state_dict[name]
                self.entries[name] = Entry(state_dict[name].dtype, tuple(state_dict[name].shape))

    @staticmethod
    def _load(path: Path) -> dict[str, torch.Tensor]:
        try:
            mapped = zipfile.is_zipfile(path)  # older files are not, and can only be read whole
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{path} is missing, broken or holds more than tensors: {reason}") from error

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name]


def copy_bytes(source: BinaryIO, target: BinaryIO, size: int, path: Path, advance: Advance) -> None:
    """Copies the next `size` bytes between unbuffered files; inside the kernel, where it can."""
    within_kernel = hasattr(os, "copy_file_range")
    while size:
        count = min(size, COPY_BYTES)
        if within_kernel:
            try:
                count = os.copy_file_range(source.fileno(), target.fileno(), count)
            except OSError:  # between file systems, or not known to this one; it says so before copying anything
                within_kernel = False
                continue
            if count == 0:
                raise ValueError(f"{path} ended early; it was shortened while it was read")
        else:
            buffer = memoryview(bytearray(count))
            read_exactly(source, buffer, path)
            write_all(target, buffer)
        size -= count
        advance(count)


def copy_checked(source: BinaryIO, target: BinaryIO, entry: Entry, path: Path, advance: Advance, check: Check) -> None:
    """Copies a tensor between unbuffered files, each part checked before it is written."""
    buffer = torch.empty(min(entry.size, CHECK_BYTES), dtype=torch.uint8)
    for start in range(0, entry.size, CHECK_BYTES):
        part = buffer[: min(CHECK_BYTES, entry.size - start)]
        read_exactly(source, part.numpy().data, path)
        check(part.view(entry.dtype))
        write_all(target, part.numpy().data)
        advance(len(part))


def write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    """Writes to an unbuffered file, which may take less than it is given."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def read_exactly(file: BinaryIO, buffer: memoryview, path: Path) -> None:
    filled = 0
    while filled < len(buffer):
        count = file.readinto(buffer[filled:])  # type: ignore[attr-defined]
        if not count:
            raise ValueError(f"{path} ended early; it was shortened while it was read")
        filled += count


# Finding the files of a folder ---------------------------------------------------------------------------------------

# In the order in which transformers looks for them.
LAYOUTS: tuple[tuple[str, type], ...] = (("model.safetensors", SafetensorsSource), ("pytorch_model.bin", BinSource))


def open_checkpoint(folder: Path) -> SafetensorsSource | BinSource:
    """The tensors of a checkpoint folder.

    Raises:
        ValueError: no weights, or a missing, truncated or broken file, by name.
    """
    for name, source_class in LAYOUTS:
        if (folder / name).exists():
            return source_class(folder, {folder / name: None})
        index = folder / f"{name}.index.json"
        if index.exists():
            return source_class(folder, read_index(index))
    looked_for = " or ".join(name for name, _ in LAYOUTS)
    raise ValueError(f"{folder} holds no {looked_for}, and no index of one")


def read_index(path: Path) -> dict[Path, list[str]]:
    """The tensors of each shard, from an index file; shards must lie beside it."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        pairs = [(str(name), str(file)) for name, file in weight_map.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not an index of shards: it needs an object 'weight_map'") from error
    shards: dict[Path, list[str]] = {}
    for name, file in pairs:
        if file in ("", ".", "..") or "/" in file or "\\" in file:
            raise ValueError(f"{path}: weight_map[{name!r}] ({file!r}) leaves the folder; shards must lie beside it")
        shards.setdefault(path.parent / file, []).append(name)
    missing = sorted(str(shard) for shard in shards if not shard.is_file())
    if missing:
        raise ValueError(f"{path} names {missing[0]}, which does not exist")
    return shards
