"""Rows of Parquet files and of datasets that Hugging Face's `save_to_disk` wrote, read batch by batch with pyarrow.

A saved dataset is a folder of Arrow files and a `state.json` that lists them. No code from there is run, and the
datasets library is not needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from minitron_megatron.data.rows import Row, without_nulls
from minitron_megatron.errors import DataError

if TYPE_CHECKING:
    import pyarrow

_STATE, _SPLITS = "state.json", "dataset_dict.json"
_BATCH_ROWS = 256


def is_dataset(path: Path) -> bool:
    """Returns whether a folder was written by `save_to_disk`."""
    return (path / _STATE).is_file() or (path / _SPLITS).is_file()


def read_parquet(file: Path, fields: list[str]) -> Iterator[Row]:
    """Yields the rows of a Parquet file.

    Args:
        file: its path.
        fields: to read, where they exist.

    Raises:
        DataError: it is not a Parquet file, or pyarrow is not installed.
    """
    parquet = _pyarrow("pyarrow.parquet", file)
    with _convert_arrow_errors(file), parquet.ParquetFile(file) as table:
        names = [name for name in fields if name in table.schema_arrow.names]
        yield from _rows(file, table.iter_batches(_BATCH_ROWS, columns=names))


def read_dataset(folder: Path, fields: list[str]) -> Iterator[Row]:
    """Yields the rows of a saved dataset; see `read_parquet`.

    Raises:
        DataError: it is damaged, it has several splits, or pyarrow is not installed.
    """
    if not (folder / _STATE).is_file():
        splits = sorted(path.parent.name for path in folder.glob(f"*/{_STATE}"))
        raise DataError(
            f"{folder} is a dataset of several splits ({', '.join(splits)}): name one, as in {folder}/train"
        )
    pyarrow = _pyarrow("pyarrow", folder)
    try:
        names = [entry["filename"] for entry in json.loads((folder / _STATE).read_text())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / _STATE} does not list the dataset's files: save the dataset again") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise DataError(f"{folder / _STATE} names {name!r}, which is not a file in its folder")
        file = folder / name
        with (
            _convert_arrow_errors(file),
            pyarrow.memory_map(str(file)) as source,
            pyarrow.ipc.open_stream(source) as table,
        ):
            known = [field for field in fields if field in table.schema.names]
            batches = (batch.select(known) for batch in table)
            yield from _rows(file, (part for batch in batches for part in _slices(batch)))


def _slices(batch: pyarrow.RecordBatch) -> Iterator[pyarrow.RecordBatch]:
    """Yields a batch in parts of `_BATCH_ROWS`: those of Arrow files may be of any size."""
    for first in range(0, batch.num_rows, _BATCH_ROWS):
        yield batch.slice(first, _BATCH_ROWS)


def _rows(file: Path, batches: Iterable[pyarrow.RecordBatch]) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist(maps_as_pydicts="strict"):
            yield f"{file}, row {number}", {name: without_nulls(value) for name, value in row.items()}
            number += 1


def _pyarrow(module: str, source: Path) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as error:
        raise DataError(
            f"{source} is read with pyarrow, which is not installed: pip install 'minitron-megatron[data]'"
        ) from error


@contextmanager
def _convert_arrow_errors(file: Path) -> Iterator[None]:
    """Turns pyarrow's errors about a file into a DataError."""
    import pyarrow

    try:
        yield
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
