"""Small data sets of token statistics on disk."""

from pathlib import Path

import numpy as np

from dlogp_kernels.report.dataset import SCHEMA, STATISTICS, ResponseRows, to_table, write_part

_TOP = [field.name for field in SCHEMA if field.name.endswith(("top_token", "top_logp"))]


def token_rows(source, token_ids, texts, line=1, **values) -> ResponseRows:
    columns = {name: np.asarray(values.get(name, np.zeros(len(token_ids))), np.float32) for name in STATISTICS}
    for name in _TOP:
        kind = SCHEMA.field(name).type.to_pandas_dtype()
        columns[name] = np.asarray(values.get(name, np.zeros(len(token_ids))), kind)
    return ResponseRows(f"s{line}", line, source, np.asarray(token_ids), texts, columns)


def write_dataset(directory: Path, *parts) -> Path:
    (directory / "tokens").mkdir(parents=True)
    for index, part in enumerate(parts):
        write_part(directory, index, to_table(part))
    return directory
