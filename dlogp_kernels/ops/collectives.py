"""What ranks of a process group tell each other: bytes that are moved, and added in the order of ranks.

A library's all-reduce adds in an order that depends on where a number lies in the tensor, so a row's bits would depend
on the other rows.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor
from torch.nn.functional import pad

from ..reference.statistics import accumulation_dtype


def group_of(name: str) -> Any:
    """The process group of this name, which is what an op can be given of it."""
    from torch.distributed.distributed_c10d import _resolve_process_group  # not in builds without torch.distributed

    return _resolve_process_group(name)  # type: ignore[arg-type]


def gathered(x: Tensor, group: Any) -> Tensor:
    """(R, …): that of every rank, all of one shape, in their order."""
    x = x.contiguous()
    found = x.new_empty((group.size(), *x.shape))
    # The second name is the older one, from which PyTorch 2.13 turns away.
    gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
    gather(_bytes(found), _bytes(x), group)
    return found


def add_over_ranks(x: Tensor, group: Any, workspace: int) -> None:
    """Put the sum over all ranks, rounded once, in the place of x, which is contiguous."""
    ranks = group.size()
    if ranks == 1:
        return
    # What is sent and received, the sum and all sums.
    block = max(1, workspace // (4 * ranks * accumulation_dtype(x).itemsize)) * ranks
    for part in x.view(-1).split(block):
        sent = pad(part, (0, -part.numel() % ranks))
        received = torch.empty_like(sent)
        distributed.all_to_all_single(_bytes(received), _bytes(sent), group=group)
        own = functools.reduce(torch.add, received.view(ranks, -1).to(accumulation_dtype(x)).unbind(0)).to(x.dtype)
        part.copy_(gathered(own, group).view(-1)[: part.numel()])


def gathered_rows(x: Tensor, starts: Sequence[int], group: Any) -> Tensor:
    """All rows, of which every rank has those by `starts`."""
    sizes, total = [end - start for start, end in _spans(starts)], starts[-1]
    missing = max(sizes) - x.shape[0]
    found = gathered(pad(x, (*(0, 0) * (x.dim() - 1), 0, missing)) if missing else x, group)
    if all(start == min(rank * max(sizes), total) for rank, start in enumerate(starts)):
        return found.view(-1, *x.shape[1:])[:total]  # the last ranks alone have fewer
    return torch.cat([of_rank[:size] for of_rank, size in zip(found, sizes, strict=True)])


def sum_of_parts(x: Tensor, starts: Sequence[int], group: Any, workspace: int) -> Tensor:
    """This rank's rows by `starts` of the sum of x, which every rank has of the whole, rounded once."""
    ranks, width = group.size(), math.prod(x.shape[1:])
    spans, dtype = _spans(starts), accumulation_dtype(x)
    own_size = starts[group.rank() + 1] - starts[group.rank()]
    found = x.new_empty((own_size, *x.shape[1:]))
    # What is sent and received of every rank's rows, and the sum.
    block = max(1, workspace // (4 * ranks * width * dtype.itemsize))
    for begin in range(0, max(end - start for start, end in spans), block):
        parts = [x[start:end][begin : begin + block] for start, end in spans]
        own = found[begin : begin + block]
        received = x.new_empty((ranks, *own.shape))
        sizes = [part.numel() * x.itemsize for part in parts]
        distributed.all_to_all_single(
            _bytes(received), _bytes(torch.cat(parts)), [own.numel() * x.itemsize] * ranks, sizes, group=group
        )
        own.copy_(functools.reduce(torch.add, received.to(dtype).unbind(0)))
    return found


def exchanged(rows: Tensor, starts: Sequence[int], wanted_starts: Sequence[int], group: Any) -> Tensor:
    """Rows from wanted_starts[rank] to wanted_starts[rank + 1] of a tensor of which ranks have those by `starts`."""
    rank, width = group.rank(), math.prod(rows.shape[1:])
    spans, wanted_spans = _spans(starts), _spans(wanted_starts)
    sent = [_overlap(spans[rank], wanted) * width for wanted in wanted_spans]
    received = [_overlap(span, wanted_spans[rank]) * width for span in spans]
    found = rows.new_empty((sum(received) // width, *rows.shape[1:]))
    size = rows.itemsize
    distributed.all_to_all_single(
        _bytes(found), _bytes(rows.contiguous()), [n * size for n in received], [n * size for n in sent], group=group
    )
    return found


def _spans(starts: Sequence[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise(starts))


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> int:
    return max(0, min(one[1], other[1]) - max(one[0], other[0]))


def _bytes(x: Tensor) -> Tensor:
    """Flat, of a type that every library of collectives moves."""
    return x.view(-1).view(torch.uint8)
