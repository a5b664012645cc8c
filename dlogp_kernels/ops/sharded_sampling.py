"""`linear_extrapolated_sample` over a vocabulary whose shards lie on the ranks of a process group.

Each rank draws from its shard by the op of one device, with the noise of the whole vocabulary; of that a few numbers a
row are gathered, and reference/sampled_shards.py folds them. What needs whole rows gathers their logits instead.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..eager.sampling import counters_of, linear_extrapolated_sample, logits_at
from ..inputs import Head, NoiseInputs, SampleOptions, Shards, flat_transform, rebuilt
from ..reference import sampled_shards as reference
from ..reference.rows import MASKED
from ..reference.sampling import WITH_STATISTICS
from ..reference.statistics import accumulation_dtype
from ..results import DeltaLogpStats
from . import backends, library
from .collectives import gathered, gathered_rows
from .linear_extrapolated_sample import fake
from .sharded import Place

#: Places in what linear_delta_logp_fwd returns.
_STATISTICS = [DeltaLogpStats._fields.index(name) for name in ("entropy", "base_entropy", "kl", "reverse_kl")]
#: Numbers of a row that a rank tells, besides statistics.
_NUMBERS = 8
#: What folding takes of the workspace, as what computes logits of winners does, and of it a row of each shard.
_SHARE, _ROW_BYTES = 2, 1024


def _sample(*flat: Any) -> tuple[Tensor, ...]:
    head, base, shards, noise, options = rebuilt((Head, Head, Shards, NoiseInputs, SampleOptions), iter(flat))
    place = Place.of(shards, {"weight": head.weight, "base_weight": base.weight})
    draw = _from_logits if _needs_logits(head, base, shards.starts, options) else _from_winners
    with backends.without_autocast(head.hidden.device):
        return draw(head, base, shards, place, noise, options)


def _needs_logits(head: Head, base: Head, starts: list[int], options: SampleOptions) -> bool:
    """The same on every rank. A filter has to see whole rows, and noise begins at multiples of 4.

    A bias may mask all of a shard, from which the op of one device draws nothing then, or tokens for which the least
    z_B of all shards stands in.
    """
    apart = any(start % 4 for start, end in pairwise(starts) if start < end)
    return apart or head.bias is not None or base.bias is not None or options.truncate(starts[-1])


def _from_logits(
    head: Head, base: Head, shards: Shards, place: Place, noise: NoiseInputs, options: SampleOptions
) -> tuple[Tensor, ...]:
    """Logits of the shards are gathered, a block of rows at a time, and every rank draws from them."""

    def whole(logits: Tensor) -> Tensor:
        return gathered_rows(logits.t(), shards.starts, place.group).t()

    return linear_extrapolated_sample(head, base, noise, options, backends.workspace(), place.vocabulary, whole)


def _from_winners(
    head: Head, base: Head, shards: Shards, place: Place, noise: NoiseInputs, options: SampleOptions
) -> tuple[Tensor, ...]:
    n, device = head.hidden.shape[:-1].numel(), head.hidden.device
    with_statistics = options.criterion in WITH_STATISTICS
    if place.first < place.end:
        own = _numbers(head, base, place.first, noise, options, with_statistics)
    else:
        size = _NUMBERS + with_statistics * len(_STATISTICS)
        own = torch.zeros(size, n, dtype=torch.float64, device=device)
    row_id, seed, step = counters_of(noise, n, device)
    dtype, blocks = accumulation_dtype(*head[:3], *base[:3]), []
    size = max(1, backends.workspace() // (_SHARE * _ROW_BYTES * place.group.size()))
    for numbers, own_id, own_step in zip(own.split(size, 1), row_id.split(size), step.split(size), strict=True):
        of_ranks = zip(gathered(numbers, place.group), pairwise(shards.starts), strict=True)
        found = torch.stack([x for x, (start, end) in of_ranks if start < end])
        counters = reference.Counters(own_id, seed, own_step)
        blocks.append(reference.sample_of(reference.ShardSamples.of(found), counters, options, dtype))
    return tuple(torch.cat(values) for values in zip(*blocks, strict=True))


def _numbers(
    head: Head, base: Head, first: int, noise: NoiseInputs, options: SampleOptions, with_statistics: bool
) -> Tensor:
    """What this rank tells of its shard, (numbers, N) in float64, in the order of reference.ShardSamples.

    Both of its winners are drawn, whatever the criterion will say of the whole vocabulary.
    """
    heads = [x for one in (head, base) for x in (*one[:3], flat_transform(*one.transform))]
    both = options._replace(criterion="none" if options.criterion == "none" else "all", threshold=None)
    drawn = torch.ops.dlogp.linear_extrapolated_sample(*heads, *noise._replace(first_token=first), *both)
    token, draft_token, _, _, logp, base_logp = drawn
    tokens = torch.stack((draft_token, token), 1)
    readable = tokens.clamp_min(0)  # −1 where the row has none
    z = [logits_at(one, readable, backends.workspace() // _SHARE).t() for one in (head, base)]
    rows = [(tokens + first).t(), *z, logp[None], base_logp[None]]
    if with_statistics:
        found = torch.ops.dlogp.linear_delta_logp_fwd(*heads, readable[:, :1].contiguous(), MASKED, False)
        rows += [found[i][None] for i in _STATISTICS]
    return torch.cat([x.double() for x in rows])


library.register_everywhere("sharded_linear_extrapolated_sample", fake, _sample)
