"""Rows in Arrow IPC streams, the files that `datasets.Dataset.from_file` maps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from soup.data.shapes import TOKENISED
from soup.errors import Problem, Refused

_BATCH_ROWS = 1000  # of a record batch


def write(file: Path, shape: str, rows: Iterable[dict[str, Any]], files: list[Path]) -> list[str]:
    """Writes the rows batch by batch, or at the end where the columns' types are not known before."""
    import pyarrow as pa

    writer = schema = None
    batch: list[dict[str, Any]] = []
    try:
        for row in rows:
            batch.append(row)
            if len(batch) == _BATCH_ROWS and shape != "prompt":
                schema = schema or schema_of(shape, batch[0])
                writer = writer or pa.ipc.new_stream(file, schema)
                writer.write_table(_table(batch, schema))
                batch = []
        schema = schema or (_inferred(batch, files) if shape == "prompt" else schema_of(shape, batch[0]))
        writer = writer or pa.ipc.new_stream(file, schema)
        if batch:
            writer.write_table(_table(batch, schema), max_chunksize=_BATCH_ROWS)
    finally:
        if writer is not None:
            writer.close()
    return schema.names


def _side_type(value: Any) -> Any:
    import pyarrow as pa

    return (
        pa.string()
        if isinstance(value, str)
        else pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
    )


def schema_of(shape: str, row: dict[str, Any]) -> Any:
    import pyarrow as pa

    ids = pa.list_(pa.int32())
    if shape in TOKENISED:
        return pa.schema(
            {name: pa.float64() if isinstance(value, float) else ids for name, value in row.items()}
        )
    kinds = {"label": pa.bool_()} | {name: ids for name in row if name.endswith("_ids")}
    kinds |= {name: pa.float64() for name, value in row.items() if isinstance(value, float)}
    return pa.schema({name: kinds.get(name) or _side_type(value) for name, value in row.items()})


def _inferred(rows: list[dict[str, Any]], files: list[Path]) -> Any:
    """The types of prompt rows' columns, which may hold anything, if only each holds one kind of thing."""
    import pyarrow as pa

    types, problems = {}, []
    for name in dict.fromkeys(name for row in rows for name in row):
        try:
            types[name] = pa.array([row.get(name) for row in rows]).type
        except (pa.ArrowException, OverflowError, UnicodeError) as error:
            kinds = sorted({type(row.get(name)).__name__ for row in rows} - {"NoneType"})
            problems.append(
                Problem(
                    key="data.train",
                    value=", ".join(map(str, files[:3])),
                    why=f"the column `{name}` cannot be one column ({', '.join(kinds)}): {error}",
                    fix=f"write `{name}` the same way in all rows, or leave it out",
                )
            )
    if problems:
        raise Refused(problems)
    types["prompt"] = _side_type(rows[0]["prompt"])
    return pa.schema(types)


def _table(rows: list[dict[str, Any]], schema: Any) -> Any:
    import pyarrow as pa

    columns = [pa.array([row.get(one.name) for row in rows], type=one.type) for one in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def part(whole: Path, file: Path, mask_R: Any) -> None:
    """The rows of `whole` that the mask takes."""
    import pyarrow as pa

    start = 0
    with (
        pa.memory_map(str(whole)) as source,
        pa.ipc.open_stream(source) as reader,
        pa.ipc.new_stream(file, reader.schema) as writer,
    ):
        for batch in reader:
            writer.write_batch(batch.filter(pa.array(mask_R[start : start + len(batch)])))
            start += len(batch)


def first(file: Path, rows: int) -> list[dict[str, Any]]:
    """The first rows of a stream."""
    import pyarrow as pa

    found: list[dict[str, Any]] = []
    with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as reader:
        for batch in reader:
            if len(found) >= rows:
                break
            found += batch.slice(0, rows - len(found)).to_pylist()
    return found


def column(file: Path, name: str) -> Iterator[Any]:
    """One column of a stream, value by value."""
    import pyarrow as pa

    with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as reader:
        for batch in reader:
            yield from batch.column(name).to_pylist()
