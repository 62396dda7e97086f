"""Writes safetensors files tensor by tensor: import, export and regroup all write their checkpoints here.

What is to be written comes as pieces, in the model's order. A piece knows the names, dtypes and shapes of its tensors
before any data is read. Some are copied; the others are computed, each while the one before and what is copied between
them are written, so that two such pieces are in memory at a time.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from .checkpoint import DTYPE_NAMES, Advance, Check, Entry, SafetensorsSource, Source, write_all


MAX_SHARD_BYTES = 5_000_000_000

# Called with the shard being written, the number of shards, the bytes written since the last call, and all bytes.
Progress = Callable[[int, int, int, int], None]


def ignore_progress(shard: int, shards: int, written: int, total: int) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Piece:
    """Tensors that are made together and lie in one shard.

    Args:
        entries: Their names in the new file, with dtypes and shapes.
        tensors: Computes them, in the order of `entries`; called once, in a thread.
        copy: Instead of `tensors`, writes the data of a single entry to a file as they are.
    """

    entries: Mapping[str, Entry]
    tensors: Callable[[], Sequence[torch.Tensor]] | None = None
    copy: Callable[[BinaryIO, Advance], None] | None = None

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return sum(entry.size for entry in self.entries.values())

    def write(self, tensors: Sequence[torch.Tensor], file: BinaryIO, advance: Advance) -> None:
        """Writes what was computed to a file."""
        for tensor, (name, entry) in zip(tensors, self.entries.items(), strict=True):
            if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
                raise RuntimeError(f"{name} was announced as {entry}, but is {tensor.dtype} {tuple(tensor.shape)}")
            write_all(file, bytes_of(tensor))
            advance(entry.size)


def unchanged(source: Source, name: str, new_name: str | None = None, check: Check | None = None) -> Piece:
    """A tensor of a checkpoint as it is; of a safetensors file its bytes are copied and never become a whole tensor.

    Args:
        check: Sees it, whole or part by part, before it is written; raises to stop.
    """
    entries = {new_name or name: source.entries[name]}
    if isinstance(source, SafetensorsSource):
        return Piece(entries, copy=lambda file, advance: source.copy(name, file, advance, check))

    def tensors() -> list[torch.Tensor]:
        tensor = source.read(name)
        if check is not None:
            check(tensor)
        return [tensor]

    return Piece(entries, tensors)


def write_shards(
    pieces: Iterable[Piece],
    folder: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress = ignore_progress,
) -> None:
    """Writes pieces as `model.safetensors`, or as shards with an index, under transformers' names.

    Args:
        pieces: All tensors of the checkpoint, in the model's order.
        folder: Where to write; it exists, and is renamed by the caller when all is whole.
        max_shard_bytes: Largest shard; a larger piece gets a shard of its own.
        progress: Called after each piece, or each few megabytes of one that is copied.
    """
    shards = plan_shards(pieces, max_shard_bytes)
    contents = [{name: entry for piece in shard for name, entry in piece.entries.items()} for shard in shards]
    total = sum(piece.size for shard in shards for piece in shard)
    files = shard_names(len(shards))
    with ThreadPoolExecutor(1) as pool:
        take = compute_ahead((piece for shard in shards for piece in shard), pool)
        for number, (shard_file, shard, content) in enumerate(zip(files, shards, contents), start=1):

            def advance(written: int, number: int = number) -> None:
                progress(number, len(shards), written, total)

            with open(folder / shard_file, "wb", buffering=0) as file:
                write_all(file, header_of(content))
                for piece in shard:
                    if piece.copy is not None:
                        piece.copy(file, advance)
                    else:
                        piece.write(take(), file, advance)
    if len(shards) > 1:
        write_index(folder, dict(zip(files, contents)))


def compute_ahead(pieces: Iterable[Piece], pool: Executor) -> Callable[[], Sequence[torch.Tensor]]:
    """Begins with the first piece that is computed. Each call returns the next one's tensors and begins another."""
    waiting = [piece.tensors for piece in reversed(list(pieces)) if piece.tensors is not None]
    begun = [pool.submit(waiting.pop())] if waiting else []

    def take() -> Sequence[torch.Tensor]:
        tensors = begun.pop().result()
        if waiting:
            begun.append(pool.submit(waiting.pop()))
        return tensors

    return take


def plan_shards(pieces: Iterable[Piece], max_bytes: int) -> list[list[Piece]]:
    """Pieces in their order, cut into shards. Wider dtypes come first in each, so that all stay aligned."""
    shards: list[list[Piece]] = [[]]
    filled = 0
    for piece in pieces:
        if shards[-1] and filled + piece.size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(piece)
        filled += piece.size
    for shard in shards:
        shard.sort(key=lambda piece: -max(entry.dtype.itemsize for entry in piece.entries.values()))
    return shards


def header_of(entries: Mapping[str, Entry]) -> bytes:
    """A safetensors header: its length, and names, dtypes, shapes and offsets as JSON, padded to 8 bytes."""
    header: dict = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, entry in entries.items():
        ends = [offset, offset + entry.size]
        header[name] = {"dtype": DTYPE_NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": ends}
        offset = ends[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def shard_names(count: int) -> list[str]:
    """Transformers' file names for so many shards."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_index(folder: Path, shards: Mapping[str, Mapping[str, Entry]]) -> None:
    index = {
        "metadata": {"total_size": sum(entry.size for entries in shards.values() for entry in entries.values())},
        "weight_map": {name: file for file, entries in shards.items() for name in entries},
    }
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
