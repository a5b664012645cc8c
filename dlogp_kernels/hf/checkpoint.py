"""The weights of a checkpoint as its safetensors files hold them, read a block of rows at a time."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

#: Floating dtypes that a model can compute in, by the names that safetensors has for them.
_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_BLOCK_BYTES = 64 * 2**20


class Stored(NamedTuple):
    """Where a tensor lies, the name of its dtype in the file, and its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def stored_tensors(name_or_path: str | Path) -> dict[str, Stored]:
    """The tensors of a model by name, from the headers of the files that `transformers` would read.

    Raises ValueError, with the file's name, for an index or a file that is damaged; OSError where one is missing.
    """
    tensors = {}
    for path in _files(name_or_path):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    view = file.get_slice(name)
                    tensors[name] = Stored(path, view.get_dtype(), tuple(view.get_shape()))
        except SafetensorError as error:
            raise ValueError(
                f"{name_or_path}: a safetensors file is truncated or damaged ({path.name}: {error}), expected whole "
                "files: get it again"
            ) from error
    return tensors


def own_dtype(tensors: Mapping[str, Stored]) -> torch.dtype | None:
    """The floating dtype of most weights; None where most are in one that models can not compute in (quantised)."""
    count: Counter[str] = Counter()
    for stored in tensors.values():
        count[stored.dtype] += torch.Size(stored.shape).numel()
    return _FLOATS.get(max(count, key=lambda name: count[name], default=""))


def is_rounded(stored: Stored, dtype: torch.dtype) -> bool:
    """Whether the tensor has more digits than `dtype` keeps."""
    return stored.dtype in _FLOATS and torch.finfo(_FLOATS[stored.dtype]).eps < torch.finfo(dtype).eps


class Update(NamedTuple):
    """‖W_RL − W_base‖ over some weights, and the norm of what rounding both to their dtypes changes in it."""

    norm: float
    rounding: float


def update_and_rounding(
    rl: Mapping[str, Stored],
    base: Mapping[str, Stored],
    dtypes: tuple[torch.dtype, torch.dtype],
    lm_head_names: tuple[str, ...],
) -> tuple[Update, Update]:
    """Of all weights that both have, and of those whose names end as one of `lm_head_names`; blockwise."""
    sums = torch.zeros(2, 2, dtype=torch.float64)
    for name in rl.keys() & base.keys():
        one, other = rl[name], base[name]
        if one.shape[1:] != other.shape[1:] or not {one.dtype, other.dtype} <= _FLOATS.keys():
            continue
        own = torch.zeros(2, dtype=torch.float64)
        for rows, base_rows in _blocks(name, one, other):
            update = rows - base_rows
            rounded = rows.to(dtypes[0]).to(rows.dtype) - base_rows.to(dtypes[1]).to(rows.dtype)
            own += torch.stack([update.norm(), (rounded - update).norm()]).double() ** 2
        sums[0] += own
        sums[1] += own if name.endswith(lm_head_names) else 0
    return tuple(Update(*values) for values in sums.sqrt().tolist())  # type: ignore[return-value]


def _files(name_or_path: str | Path) -> list[Path]:
    whole = cached_file(name_or_path, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
    if whole is not None:
        return [Path(whole)]
    index = cached_file(name_or_path, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    if index is None:
        return []
    try:
        shards = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: is not an index with a weight_map ({error!r}): get it again") from error
    return [Path(str(cached_file(name_or_path, shard))) for shard in sorted(shards)]


def _blocks(name: str, one: Stored, other: Stored) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of the same rows of both tensors, those that both have, in float32 or wider."""
    with safe_open(one.file, framework="pt") as file, safe_open(other.file, framework="pt") as base_file:
        if not one.shape:
            yield _wide(file.get_tensor(name)), _wide(base_file.get_tensor(name))
            return
        views = file.get_slice(name), base_file.get_slice(name)
        rows = min(one.shape[0], other.shape[0])
        step = max(1, _BLOCK_BYTES // (8 * max(1, torch.Size(one.shape[1:]).numel())))
        for begin in range(0, rows, step):
            yield tuple(_wide(view[begin : min(begin + step, rows)]) for view in views)  # type: ignore[misc]


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
