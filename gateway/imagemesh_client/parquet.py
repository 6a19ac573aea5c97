"""An index as a Parquet file."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import pyarrow
import pyarrow.parquet

from imagemesh_client.search import Index
from imagemesh_runtime.tensors import Array


class ParquetFile:
    """A file of the columns "id" and "vector": under its name once it is finished, NAME.part until then."""

    def __init__(self, path: str | os.PathLike[str], index: Index) -> None:
        self._path = Path(path)
        self._part = self._path.with_name(f"{self._path.name}.part")
        self._count = 0
        vector = pyarrow.list_(pyarrow.float32(), index.width)
        fields = [
            pyarrow.field("id", pyarrow.string(), nullable=False),
            pyarrow.field("vector", vector, nullable=False),
        ]
        self._schema = pyarrow.schema(fields, {"imagemesh": json.dumps(asdict(index))})
        self._file = self._part.open("wb")
        self._writer = pyarrow.parquet.ParquetWriter(self._file, self._schema)

    def add(self, ids: Sequence[str], vectors: Array) -> None:
        """Write float32 [ids, width]."""
        flat = pyarrow.array(vectors.reshape(-1))
        rows = pyarrow.FixedSizeListArray.from_arrays(flat, type=self._schema.field("vector").type)
        self._writer.write_table(pyarrow.table([pyarrow.array(list(ids), pyarrow.string()), rows], schema=self._schema))
        self._count += len(ids)

    def finish(self) -> int:
        """Give the file its name; how many rows it has."""
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._part.replace(self._path)
        return self._count

    def discard(self) -> None:
        """Take away what is not finished."""
        if not self._file.closed:
            with suppress(Exception):  # it may lack what it would write last
                self._writer.close()
            self._file.close()
        self._part.unlink(missing_ok=True)
