"""The linear ops over a vocabulary whose shards lie on the ranks of a process group, by the ops of one device.

Each rank runs the op of one device over its shard, with the targets that lie there; what it finds of each token is
gathered and folded by reference/shards.py. Backward has the normalizers of the whole vocabulary then: its op needs no
more of other ranks, the weight's gradient stays where it is, and those by hidden states are added over ranks.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..checks import all_inside, check_target_range
from ..inputs import Argument, Asked, Shards, Targets, arguments
from ..reference import shards as reference
from ..reference.rows import MASKED
from ..reference.statistics import accumulation_dtype
from ..results import allocated
from . import backends, library, statistics
from .collectives import add_over_ranks, exchanged, gathered, gathered_rows, group_of, sum_of_parts
from .schemas import SHARDED, STATISTICS, Statistics

#: A target that no vocabulary has: the op of one device answers as it does to what is outside of its own.
_OUTSIDE = -1
#: Sums of targets, by which ranks notice that theirs differ, are below: float32 holds them.
_SUMS = 2**23
#: Of a target's place among the candidates; odd, so that two targets of one candidate never have the same sum.
_ODD = 2654435761


class Place(NamedTuple):
    """This rank's in the group: it has the tokens from `first` to `end` of the vocabulary."""

    group: Any
    first: int
    end: int
    vocabulary: int

    @classmethod
    def of(cls, shards: Shards, weights: dict[str, Tensor]) -> "Place":
        """ValueError where weights, by name, have other rows than those of the tokens."""
        group, starts = group_of(shards.group), shards.starts
        if len(starts) != group.size() + 1:
            raise ValueError(f"starts has {len(starts)} numbers, expected {group.size() + 1}: one a rank, and the end")
        first, end = starts[group.rank() :][:2]
        for name, weight in weights.items():
            if weight.shape[0] != end - first:
                raise ValueError(f"{name} has {weight.shape[0]} rows, expected {end - first}, a token each")
        return cls(group, first, end, starts[-1])


class _LocalTargets(NamedTuple):
    """target (N, K) as the op of one device takes it, and which of them lie on this rank and on others.

    What lies elsewhere stands at the first token, so that the row is read. Ignored ones are MASKED, for an ignore_index
    may be a token of a shard.
    """

    target: Tensor
    here: Tensor
    elsewhere: Tensor

    @classmethod
    def of(cls, targets: Targets, place: Place) -> "_LocalTargets":
        target, ignored = targets.target, targets.target == targets.ignore_index
        here = (target >= place.first) & (target < place.end) & ~ignored
        outside = (target < 0) | (target >= place.vocabulary)
        local = (target - place.first).masked_fill(~here, 0).masked_fill(outside, _OUTSIDE)
        return cls(local.masked_fill(ignored, MASKED), here, ~here & ~ignored)


def _by_name(names: Iterable[Argument], flat: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip((x.name for x in names), flat, strict=True))


def _of(plain: Statistics, given: dict[str, Any]) -> tuple[Place, Targets, _LocalTargets]:
    weights = {x.name: given[x.name] for x in plain.inputs() if x.name.endswith("weight")}
    place = Place.of(Shards(given["group"], given["starts"]), weights)
    targets = Targets(given["target"], given["ignore_index"])
    return place, targets, _LocalTargets.of(targets, place)


def _forward(name: str, *flat: Any) -> tuple[Tensor, ...]:
    plain = STATISTICS[name]
    given = _by_name((*SHARDED[f"sharded_{name}"].inputs(), *arguments(Asked)), flat)
    place, targets, local = _of(plain, given)
    _check_range(targets, place)
    if place.first < place.end:
        of_shard = given | {"target": local.target, "ignore_index": MASKED}
        one_device = getattr(torch.ops.dlogp, f"{name}_fwd")
        found = one_device(*(of_shard[x.name] for x in (*plain.inputs(), *arguments(Asked))))
    else:
        found = _of_no_tokens(plain, given)
    state = _State(plain, targets.target.shape[1], given["top"])
    of_ranks = state.read(gathered(state.of(found, targets.target, place.first), place.group))
    return _outputs(plain, of_ranks, targets, given["starts"], found[0].dtype)


def _check_range(targets: Targets, place: Place) -> None:
    """On the CPU, and so on every rank at once; elsewhere the op of one device makes such a row NaN."""
    target, ignore_index = targets
    if target.device.type == "cpu" and not all_inside(target, place.vocabulary):
        check_target_range(target, target != ignore_index, place.vocabulary, f"or ignore_index ({ignore_index})")


def _of_no_tokens(plain: Statistics, given: dict[str, Any]) -> tuple[Tensor, ...]:
    """What the op of one device would return for a vocabulary without a token."""
    target = given["target"]
    dtype = accumulation_dtype(*(x for x in given.values() if isinstance(x, Tensor)))
    return allocated(plain.stats, target, partial(target.new_full, fill_value=-torch.inf), dtype, given["top"]).flat()


class _OfRanks(NamedTuple):
    """What all ranks found, in float64: of each model, of a pair, and sums of the targets (R, N).

    Of a pair Δlog p (R, N, K) and both divergences (R, N).
    """

    models: list[reference.ModelShards]
    pair: tuple[Tensor, Tensor, Tensor] | None
    sums: Tensor


class _State:
    """How what a rank tells of N tokens lies in one tensor (numbers, N), of the dtype in which the op adds."""

    def __init__(self, plain: Statistics, candidates: int, top: bool) -> None:
        self.fields, self.top = plain.outputs(), top
        self.prefixes = ("", "base_")[: len(plain.models)]
        of_model, of_pair = [candidates, 1, 1, 1, *[1, 1] * top], [candidates, 1, 1]
        self.sizes = [*of_model * len(self.prefixes), *of_pair * (len(self.prefixes) - 1), 1]

    def of(self, found: tuple[Tensor, ...], target: Tensor, first: int) -> Tensor:
        """`found` is what the op of one device returned for a shard that begins at the token `first`."""
        fields = dict(zip(self.fields, found, strict=True))
        extra, rows = fields["extra"], []
        for i, prefix in enumerate(self.prefixes):
            rows += [fields[f"{prefix}logp"].t(), fields[f"{prefix}entropy"][None], extra[2 * i :][:2]]
            if self.top:
                token, logp = extra[2 * (len(self.prefixes) + i) :][:2]
                rows += [token[None] + first, logp[None]]
        factors = (_ODD * torch.arange(1, 2 * target.shape[1], 2, device=target.device)) % _SUMS
        sums = (target * factors).sum(-1) % _SUMS
        if len(self.prefixes) == 2:
            rows += [fields["delta_logp"].t(), fields["kl"][None], fields["reverse_kl"][None]]
        return torch.cat([*rows, sums[None].to(extra.dtype)])

    def read(self, of_ranks: Tensor) -> _OfRanks:
        """Of (R, numbers, N)."""
        parts = iter(of_ranks.double().split(self.sizes, 1))
        models = []
        for _ in self.prefixes:
            logp = next(parts).transpose(1, 2)
            numbers = [next(parts)[:, 0] for _ in range(5 if self.top else 3)]
            models.append(reference.ModelShards(logp, *numbers))
        *of_pair, sums = parts
        pair = (of_pair[0].transpose(1, 2), of_pair[1][:, 0], of_pair[2][:, 0]) if of_pair else None
        return _OfRanks(models, pair, sums[:, 0])


def _outputs(
    plain: Statistics, of_ranks: _OfRanks, targets: Targets, starts: list[int], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Of the op over the whole vocabulary."""
    target, ignored = targets.target, targets.target == targets.ignore_index
    owner = torch.stack([target >= start for start in starts[:-1]]).sum(0).sub_(1).clamp_(0)
    values: dict[str, Tensor] = {}
    wholes: list[reference.Whole] = []
    normalizers: list[Tensor] = []
    tops: list[Tensor] = []
    for prefix, model in zip(("", "base_"), of_ranks.models, strict=False):
        whole = reference.whole_of(model.largest, model.rest)
        values[f"{prefix}logp"] = reference.logp_at(model, whole, owner).masked_fill(ignored, 0.0)
        values[f"{prefix}entropy"] = reference.entropy_of(model.entropy, whole)
        values[f"{prefix}lse"] = whole.lse
        wholes.append(whole)
        normalizers += [whole.largest, whole.rest]
        tops += reference.top_of(model, whole) if model.top_token is not None else ()
    if of_ranks.pair is not None:
        delta_logp, kl, reverse_kl = of_ranks.pair
        of_models = values["logp"], values["base_logp"]
        values["delta_logp"] = reference.delta_logp_at(delta_logp, *of_models, wholes, owner).masked_fill(ignored, 0.0)
        values["kl"] = reference.divergence_of(kl, *wholes)
        values["reverse_kl"] = reference.divergence_of(reverse_kl, *reversed(wholes))
    values["extra"] = torch.stack([*normalizers, *tops])
    for rows, number in ((ignored.all(-1), 0.0), (_different(of_ranks.sums), torch.nan)):
        for value in values.values():
            value.masked_fill_(rows[:, None] if value.shape == target.shape else rows, number)
        values["extra"][len(normalizers) :: 2].masked_fill_(rows, -1.0)
    return tuple(values[name].to(dtype) for name in plain.outputs())


def _different(sums: Tensor) -> Tensor:
    """(N,): where the targets of ranks differ. ValueError on the CPU; elsewhere that would mean to wait."""
    different = (sums != sums[:1]).any(0)
    if different.device.type == "cpu" and bool(different.any()):
        raise ValueError(
            f"target of row {int(different.nonzero()[0])} differs between the ranks of the group, expected the same "
            "hidden states and targets on all of them (ranks that have other data are another group)"
        )
    return different


def _backward(name: str, *flat: Any) -> Tensor | tuple[Tensor, ...]:
    plain, sharded = STATISTICS[name], SHARDED[f"sharded_{name}"]
    names = (*sharded.upstream(), *sharded.inputs(), *arguments(sharded.saved))
    *flat_but_mask, output_mask = flat
    given = _by_name(names, tuple(flat_but_mask))
    place, _, local = _of(plain, given)
    differentiable = [given[plain.inputs()[i].name] for i in plain.differentiable()]
    if place.first < place.end:
        given |= {"target": local.target, "ignore_index": MASKED}
        for prefix in ("", "base_")[: len(plain.models)]:
            given |= _of_shard(given, f"grad_{prefix}", local)
        one_device = getattr(torch.ops.dlogp, f"{name}_bwd")
        in_order = (*plain.upstream(), *plain.inputs(), *arguments(plain.saved))
        found = one_device(*(given[x.name] for x in in_order), output_mask)
    else:
        found = tuple(x.zero_() for x in library.fake_gradients(tuple(differentiable), output_mask))
    with_hidden = zip(plain.differentiable(), found, output_mask, strict=True)
    for i, grad, wanted in with_hidden:
        if wanted and plain.inputs()[i].name.endswith("hidden"):
            add_over_ranks(grad, place.group, backends.workspace())
    return found


def _of_shard(given: dict[str, Any], prefix: str, local: _LocalTargets) -> dict[str, Tensor]:
    """The upstream gradients of one model for the op of one device.

    By logits of this shard, log p of a target elsewhere has the derivative −p, as −lse has.
    """
    logp, lse = given[f"{prefix}logp"], given[f"{prefix}lse"]
    if logp is None:
        return {}
    elsewhere = logp.masked_fill(~local.elsewhere, 0.0).sum(-1)
    return {
        f"{prefix}logp": logp.masked_fill(~local.here, 0.0),
        f"{prefix}lse": -elsewhere if lse is None else lse - elsewhere,
    }


def _rows_of_ranks(rows: Tensor, group: str, starts: list[int], wanted_starts: list[int]) -> Tensor:
    return exchanged(rows, starts, wanted_starts, group_of(group))


def _fake_rows_of_ranks(rows: Tensor, group: str, starts: list[int], wanted_starts: list[int]) -> Tensor:
    return _fake_own_rows(rows, group, wanted_starts)


def _own_rows(whole: Tensor, group: str, starts: list[int]) -> Tensor:
    first, end = starts[group_of(group).rank() :][:2]
    return whole[first:end].clone()  # an op returns none of its inputs


def _fake_own_rows(whole: Tensor, group: str, starts: list[int]) -> Tensor:
    first, end = starts[group_of(group).rank() :][:2]
    return whole.new_empty((end - first, *whole.shape[1:]))


def _all_rows(rows: Tensor, group: str, starts: list[int]) -> Tensor:
    return gathered_rows(rows, starts, group_of(group))


def _fake_all_rows(rows: Tensor, group: str, starts: list[int]) -> Tensor:
    return rows.new_empty((starts[-1], *rows.shape[1:]))


def _sum_of_rows(whole: Tensor, group: str, starts: list[int]) -> Tensor:
    return sum_of_parts(whole, starts, group_of(group), backends.workspace())


def _sum_over_ranks(x: Tensor, group: str) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    add_over_ranks(total, group_of(group), backends.workspace())
    return total


def _fake_sum_over_ranks(x: Tensor, group: str) -> Tensor:
    return x.new_empty(x.shape)


def _keep_options(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.options, ctx.rows = inputs[1:], inputs[0].shape[0]


def _rows_of_ranks_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    group, starts, wanted_starts = ctx.options
    return torch.ops.dlogp.rows_of_ranks(grad, group, wanted_starts, starts), None, None, None


def _all_rows_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return torch.ops.dlogp.sum_of_rows(grad, *ctx.options), None, None


def _own_rows_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    whole = torch.ops.dlogp.all_rows(grad, *ctx.options)
    padding = (0, 0) * (grad.dim() - 1)
    return pad(whole, (*padding, 0, ctx.rows - whole.shape[0])), None, None


library.register_everywhere("rows_of_ranks", _fake_rows_of_ranks, _rows_of_ranks)
library.register_everywhere("own_rows", _fake_own_rows, _own_rows)
library.register_everywhere("all_rows", _fake_all_rows, _all_rows)
library.register_everywhere("sum_of_rows", _fake_own_rows, _sum_of_rows)
library.register_everywhere("sum_over_ranks", _fake_sum_over_ranks, _sum_over_ranks)
for _rows_op, _rows_gradient in (
    ("rows_of_ranks", _rows_of_ranks_backward),
    ("own_rows", _own_rows_backward),
    ("all_rows", _all_rows_backward),
):
    torch.library.register_autograd(
        f"dlogp::{_rows_op}", _rows_gradient, setup_context=_keep_options, lib=library.LIBRARY
    )

for _name, _op in SHARDED.items():
    _plain = _name.removeprefix("sharded_")
    statistics.register(
        _name,
        _op,
        partial(library.register_everywhere, run=partial(_forward, _plain)),
        partial(library.register_everywhere, run=partial(_backward, _plain)),
    )
