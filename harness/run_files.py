"""The files of one run's folder: encoding them, checking them against their sums, reading them back. No torch here.

``record.json`` is the RunRecord and nothing else, ``documents.parquet`` one row per scored document (absent where
nothing was scored), ``SHA256SUMS`` the sums of the other two in the format of ``sha256sum --check``.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from harness.errors import UserError
from harness.records import FORMAT_VERSION, RunRecord

RECORD = "record.json"
DOCUMENTS = "documents.parquet"
SUMS = "SHA256SUMS"

Record = TypeVar("Record", bound=RunRecord)

DOCUMENT_TYPES: dict[str, pa.DataType | None] = {
    "task": pa.string(),
    "group": pa.string(),
    "doc_id": pa.int64(),
    "doc_hash": pa.string(),
    "target": None,
    "loglikelihoods": pa.list_(pa.float64()),
    "greedy": pa.list_(pa.bool_()),
    "acc": pa.float64(),
    "acc_norm": pa.float64(),
    "margin": pa.float64(),
    "chance": pa.float64(),
}
"""Columns of ``documents.parquet``; None where the type follows the data (an index, or a text)."""

_SUM = re.compile(rf"^([0-9a-f]{{64}})  ({re.escape(RECORD)}|{re.escape(DOCUMENTS)})$", re.MULTILINE)


def encode(record: RunRecord, documents: pd.DataFrame | None = None) -> dict[str, bytes]:
    """File name -> content of a run's folder.

    Args:
        record: of the run.
        documents: one row per scored document with the columns of `DOCUMENT_TYPES`; further columns are kept.

    Raises:
        ValueError: a column of `DOCUMENT_TYPES` is missing.
    """
    files = {RECORD: record.model_dump_json(indent=1).encode() + b"\n"}
    if documents is not None:
        files[DOCUMENTS] = _to_parquet(documents)
    files[SUMS] = "".join(f"{_sha256(data)}  {name}\n" for name, data in files.items()).encode()
    return files


def read_all(folder: Path) -> dict[str, bytes]:
    """File name -> content, as `encode` made them.

    Raises:
        UserError: a file is missing or corrupt.
    """
    sums = _read_sums(folder)
    return {name: _read_checked(folder, name, sums) for name in sums} | {SUMS: _read_bytes(_path(folder, SUMS))}


def listed_in(sums: bytes) -> dict[str, str]:
    """File name -> SHA-256, as a file of sums says."""
    return {name: digest for digest, name in _SUM.findall(sums.decode(errors="replace"))}


def read_record(folder: Path, kind: type[Record]) -> Record:
    """The record of a run's folder, whole or as a `RunSummary`.

    Raises:
        UserError: it is missing or corrupt, of an unknown format version, or that of another run.
    """
    record = _parse_record(folder, _read_checked(folder, RECORD, _read_sums(folder)), kind)
    if record.spec.run_id != folder.name:
        raise UserError(
            f"{folder / RECORD} is the record of run {record.spec.run_id!r}: the folder was renamed, or written by a "
            f"harness that names runs otherwise; move it out of {folder.parent} and run again"
        )
    return record


def read_documents(folder: Path, columns: Sequence[str] | None = None) -> pd.DataFrame | None:
    """Per-document scores of a run's folder, or None where it has none.

    Args:
        folder: of the run.
        columns: of `DOCUMENT_TYPES`, to read no more than these; None reads all. Those that the harness did not know
            yet when the run was made come back empty.

    Raises:
        UserError: the file is missing or corrupt.
    """
    sums = _read_sums(folder)
    if DOCUMENTS not in sums:
        return None
    data = _read_checked(folder, DOCUMENTS, sums)
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        known = None if columns is None else [name for name in columns if name in file.schema_arrow.names]
        frame: pd.DataFrame = file.read(columns=known).to_pandas()
    except (pa.ArrowException, OSError) as error:
        raise _corrupt(folder / DOCUMENTS, "cannot be read as parquet") from error
    return frame if columns is None else frame.reindex(columns=list(columns))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _corrupt(path: Path, what: str) -> UserError:
    return UserError(f"{path} {what}; delete the folder {path.parent} and run the same command again to redo this run")


def _path(folder: Path, name: str) -> str:
    """``folder / name``, which takes longer to make than the file takes to read."""
    return f"{folder}/{name}"


def _read_bytes(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError as error:
        raise _corrupt(Path(path), "is missing") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check its permissions") from error


def _read_sums(folder: Path) -> dict[str, str]:
    """File name -> SHA-256, as written beside them."""
    data = _read_bytes(_path(folder, SUMS))
    sums = listed_in(data)
    whole = "".join(f"{digest}  {name}\n" for name, digest in sums.items()).encode() == data
    # Without this, losing the line of a file would look like a run that never had it.
    listed = DOCUMENTS in sums or not os.path.exists(_path(folder, DOCUMENTS))
    if not (whole and listed and RECORD in sums):
        raise _corrupt(folder / SUMS, "is corrupt: it does not list what the folder holds")
    return sums


def _read_checked(folder: Path, name: str, sums: dict[str, str]) -> bytes:
    data = _read_bytes(_path(folder, name))
    if _sha256(data) != sums[name]:
        raise _corrupt(folder / name, f"is corrupt: {len(data)} bytes that do not match {SUMS}")
    return data


def _parse_record(folder: Path, data: bytes, kind: type[Record]) -> Record:
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        path = folder / RECORD
        version = _format_version(data)
        if version is not None and version != FORMAT_VERSION:
            raise UserError(
                f"{path} has format version {version}, this harness reads version {FORMAT_VERSION}: use the harness "
                "that wrote it, or run again into another folder"
            ) from error
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise _corrupt(path, f"is not a valid record: {where}: {first['msg']}") from error


def _format_version(data: bytes) -> object:
    try:
        content = json.loads(data)
    except ValueError:
        return None
    return content.get("format_version") if isinstance(content, dict) else None


def _to_parquet(documents: pd.DataFrame) -> bytes:
    absent = [name for name in DOCUMENT_TYPES if name not in documents.columns]
    if absent:
        raise ValueError(f"per-document scores without the columns {absent}")
    columns = {
        str(name): pa.array(documents[name], type=DOCUMENT_TYPES.get(str(name)), from_pandas=True)
        for name in documents.columns
    }
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, compression="zstd")
    return buffer.getvalue()
