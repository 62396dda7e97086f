"""Reading data files and packing documents into rows."""

import glob
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..conversion.sources import require


DOCUMENTS = {"sample_by": "document"}  # a text file is one row
BUILDERS = {
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".md": "text",
}
TEXT_TYPES = ("string", "large_string")


def load_files(files: Iterable[str | Path], streaming: bool = False) -> Any:
    """A `datasets.Dataset` of all rows of the files, in order; or, with `streaming`, an `IterableDataset`.

    A text file is one row. Glob patterns are allowed.

    Raises:
        ValueError: no file, a path or pattern that matches nothing, an unknown or mixed kind, or an empty file.
    """
    require("datasets", what="reading data files")
    from datasets import load_dataset

    paths = expand(files)
    kinds = {path.suffix.lower() for path in paths}
    if len(kinds) != 1 or not kinds <= set(BUILDERS):
        raise ValueError(
            f"files ({', '.join(sorted(kinds))}) must be of one known kind; choose from {', '.join(sorted(BUILDERS))}"
        )
    for path in paths:
        if path.stat().st_size == 0:
            raise ValueError(f"file ({path}) is empty; give one with at least one row")
    kind = kinds.pop()
    options: dict[str, Any] = {".tsv": {"sep": "\t"}, ".txt": DOCUMENTS, ".md": DOCUMENTS}.get(kind, {})
    from datasets.exceptions import DatasetGenerationError

    try:
        dataset = load_dataset(
            BUILDERS[kind], data_files=[str(path) for path in paths], split="train", streaming=streaming, **options
        )
    except (DatasetGenerationError, ValueError) as error:  # the cause of the first one says what is wrong
        names = ", ".join(map(str, paths))
        raise ValueError(f"files ({names}) cannot be read: {error.__cause__ or error}; check their format") from error
    if not streaming and len(dataset) == 0:
        raise ValueError(f"files ({', '.join(map(str, paths))}) have no rows; give files with at least one")
    return dataset


def expand(files: Iterable[str | Path]) -> list[Path]:
    """The files that paths and glob patterns name, each pattern's sorted.

    A pattern may stand in any part of a path; `**` goes through folders, however deep.

    Raises:
        ValueError: no file at all, or a path or pattern that matches no file.
    """
    paths: list[Path] = []
    for file in files:
        found = [Path(file)] if Path(file).is_file() else matches(file)
        if not found:
            raise ValueError(f"file ({file}) is not there; check the path")
        paths += found
    if not paths:
        raise ValueError("files (none) must name at least one file")
    return paths


def matches(pattern: str | Path) -> list[Path]:
    """The files that a pattern names; where there are none, its folder is taken as it is written, brackets and all."""
    parts = Path(pattern)
    as_written = str(Path(glob.escape(str(parts.parent)), parts.name))
    for each in (str(pattern), as_written):
        found = sorted(path for path in map(Path, glob.glob(each, recursive=True)) if path.is_file())
        if found:
            return found
    return []


def read_column(files: Iterable[str | Path], column: str = "text") -> list[str]:
    """All texts of one column of the files, in order; text files are read without `datasets`.

    Raises:
        ValueError: as `load_files` and `require_text`.
    """
    paths = expand(files)
    if column == "text" and all(BUILDERS.get(path.suffix.lower()) == "text" for path in paths):
        return [read_text(path) for path in paths]
    dataset = load_files(paths)
    require_text(dataset, column)
    return list(dataset[column])


def read_text(path: Path) -> str:
    """A text file as one text. Raises ValueError where it is empty or not UTF-8."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"files ({path}) cannot be read: {error}; check their format") from error
    if not text:
        raise ValueError(f"file ({path}) is empty; give one with at least one row")
    return text


def require_column(dataset: Any, column: str) -> None:
    """Raises ValueError if the dataset has no such column."""
    if dataset.column_names is not None and column not in dataset.column_names:
        raise ValueError(f"column ({column!r}) is not in the data; choose from {', '.join(dataset.column_names)}")


def require_text(dataset: Any, column: str) -> None:
    """Raises ValueError if the dataset has no such column, or if not every row of it is text."""
    require_column(dataset, column)
    if dataset.features is not None and getattr(dataset.features[column], "dtype", None) not in TEXT_TYPES:
        raise ValueError(f"column ({column!r}) holds {dataset.features[column]}, not text; choose a column of text")
    if hasattr(dataset, "__len__") and None in dataset[column]:
        raise ValueError(f"column ({column!r}) has rows without text; remove them")


def pack(documents: Iterable[list[int]], row_length: int) -> Iterator[dict[str, list[int]]]:
    """Lays documents end to end and cuts them into rows of `row_length` tokens; a last, short one is left out.

    Each row has `input_ids`, `labels` and `position_ids`. Positions start again with each document, and with each row:
    that is how transformers' masks know, without an attention mask, that documents do not see each other. The first
    token of a document inside a row has the label -100, since nothing that it may see predicts it.
    """
    input_ids: list[int] = []
    position_ids: list[int] = []
    for document in documents:
        start = 0
        while start < len(document):
            part = document[start : start + row_length - len(input_ids)]
            input_ids += part
            position_ids += range(len(part))
            start += len(part)
            if len(input_ids) == row_length:
                labels = [-100 if position == 0 else token for token, position in zip(input_ids, position_ids)]
                yield {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
                input_ids, position_ids = [], []


def collate_rows(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Packed rows as a batch of int64 tensors (rows, row_length); from rows as NumPy arrays ten times as fast."""
    import numpy
    import torch

    return {
        name: torch.from_numpy(numpy.stack([numpy.asarray(row[name], dtype=numpy.int64) for row in rows]))
        for name in rows[0]
    }


def collate_flat(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Packed rows as one row, end to end: (1, rows * row_length).

    Flash attention reads the limits of documents from the positions of a single row only; of a batch of rows it would
    let documents see each other. The other backends read them from every row of a batch.
    """
    return {name: values.reshape(1, -1) for name, values in collate_rows(rows).items()}


def all_ids(rows: Any) -> Iterator[int]:
    """The token ids that occur in tokenized rows, some of them more than once."""
    for batch in rows.iter(1000):
        yield from {token for row in batch["input_ids"] for token in row}


def tokenize_and_pack(dataset: Any, tokenizer: Any, row_length: int, column: str = "text") -> Any:
    """A dataset of packed rows: each text between the tokenizer's begin and end tokens, packed by `pack`.

    Works on `Dataset` (tokenized once, and cached by `datasets`) and `IterableDataset` (on the fly). Rows never span
    two batches of 1,000 texts, so at most one short row in a thousand texts is left out.
    """
    require_text(dataset, column)

    def rows(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        if None in batch[column]:
            raise ValueError(f"column ({column!r}) has rows without text; remove them")
        encoded = tokenizer(
            batch[column],
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,  # documents may be longer than the model's positions: they are packed into rows
        )["input_ids"]
        begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        packed = list(pack((begin + tokens + end for tokens in encoded), row_length))
        return {name: [row[name] for row in packed] for name in ("input_ids", "labels", "position_ids")}

    return dataset.map(rows, batched=True, batch_size=1000, remove_columns=dataset.column_names)
