"""Small data sets of token statistics on disk."""

from pathlib import Path

import numpy as np

from dlogp_kernels.report.dataset import SCHEMA, STATISTICS, ResponseRows, write_part

_TOP = [field.name for field in SCHEMA if field.name.endswith(("top_token", "top_logp"))]


def token_rows(source, token_ids, texts, line=1, response=None, **values) -> ResponseRows:
    """`values` are statistics by name; `response` what else a ResponseRows has."""
    columns = {name: np.asarray(values.get(name, np.zeros(len(token_ids))), np.float32) for name in STATISTICS}
    for name in _TOP:
        kind = SCHEMA.field(name).type.to_pandas_dtype()
        columns[name] = np.asarray(values.get(name, np.zeros(len(token_ids))), kind)
    return ResponseRows(f"s{line}", line, source, np.asarray(token_ids), texts, columns, **(response or {}))


def write_dataset(directory: Path, *parts) -> Path:
    for name in ("tokens", "responses"):
        (directory / name).mkdir(parents=True)
    for index, part in enumerate(parts):
        write_part(directory, index, part)
    return directory
