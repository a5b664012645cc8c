"""How a vocabulary is parted over the ranks of a process group: what users say of it, and what the ranks agree on.

Before they compute, the ranks of a group tell each other how they were called: what does not fit together is an error
on every rank, and none waits for one that has stopped. That is 16 bytes, and once for each kind of call a message of
fixed size. Ranks that talk by NCCL alone do it at the first call of a kind: to look at every message they would have to
wait for the device.
"""

import contextlib
import hashlib
import itertools
import json
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as distributed
from torch import Tensor

from .ops.collectives import gathered, group_of

_MESSAGE_BYTES = 4096
_Checked = TypeVar("_Checked")


class VocabShard(NamedTuple):
    """What `group` of the linear functions may be instead of a process group alone.

    group: a `torch.distributed` process group, whose ranks hold the vocabulary in their order.
    start: the token of the first row of this rank's weight; by default where the rank before it ends. Said by all ranks
        or by none.
    vocab_size: the number of tokens; rows of weights from there on are padding, and left out. By default every row is
        a token.
    """

    group: Any
    start: int | None = None
    vocab_size: int | None = None


class Layout(NamedTuple):
    """Where the tokens of each rank begin and those of the last one end: in the op, and in each model's weights.

    None: the weights are whole on every rank.
    """

    starts: tuple[int, ...]
    model: tuple[int, ...] | None
    base: tuple[int, ...] | None
    #: Of this process in the group.
    rank: int = 0


class Message(NamedTuple):
    """How a rank was called, or why it can not be.

    same: what has to be the same on all ranks, by the name that an error has for it.
    """

    problem: str | None = None
    start: int | None = None
    vocab_size: int | None = None
    rows: int = 0
    base_rows: int | None = None
    same: tuple[tuple[str, str], ...] = ()


def layout_of(messages: Sequence[Message]) -> Layout:
    """That of the ranks which told these, or ValueError, the same on each."""
    for rank, message in enumerate(messages):
        if message.problem is not None:
            raise ValueError(f"group: on its rank {rank} the call is refused: {message.problem}")
    _check_same(messages)
    rows, base_rows = [x.rows for x in messages], [x.base_rows for x in messages if x.base_rows is not None]
    total, base_total = sum(rows), sum(base_rows)
    if total == 0:
        raise ValueError("weight has no rows on any rank of the group, expected those of a vocabulary")
    sharded, base_sharded = True, bool(base_rows)
    if base_rows and base_total != total:
        base_sharded, sharded = set(base_rows) != {total}, set(rows) != {base_total}
        if sharded == base_sharded:
            raise ValueError(
                f"base_weight has {base_rows} rows on the ranks of the group, expected {total} in all, as weight has, "
                f"or {total} on each"
            )
    model = _cut(_consecutive(rows, [x.start for x in messages]), messages[0].vocab_size) if sharded else None
    base = _cut(_consecutive(base_rows, []), messages[0].vocab_size) if base_sharded else None
    starts = base if model is None else model
    assert starts is not None
    return Layout(starts, model, base)


def _check_same(messages: Sequence[Message]) -> None:
    told = [dict(x.same) | {"vocab_size of VocabShard": str(x.vocab_size)} for x in messages]
    for rank, here in enumerate(told):
        for name in (*told[0], *here):
            if here.get(name) != told[0].get(name):
                raise ValueError(
                    f"{name} is {told[0].get(name)} on rank 0 of the group and {here.get(name)} on rank {rank}, "
                    "expected the same on all"
                )


def _consecutive(rows: Sequence[int], given: Sequence[int | None]) -> tuple[int, ...]:
    """Where each shard begins and the last one ends; those that were given must say the same."""
    starts = (0, *itertools.accumulate(rows))
    for rank, (start, expected) in enumerate(zip(given, starts, strict=False)):
        if start is not None and start != expected:
            kind = "they overlap" if start < expected else "between them is a gap"
            before = f"where that of rank {rank - 1} ends: {kind}" if rank else "the first token"
            raise ValueError(f"start is {start} on rank {rank} of the group, expected {expected}, {before}")
    return starts


def _cut(starts: tuple[int, ...], vocab_size: int | None) -> tuple[int, ...]:
    """Without the padding at the end."""
    if vocab_size is None:
        vocab_size = starts[-1]
    if not 0 < vocab_size <= starts[-1]:
        raise ValueError(
            f"vocab_size of VocabShard is {vocab_size}, expected at least 1 and at most {starts[-1]}, the rows on all "
            "ranks of the group"
        )
    return tuple(min(start, vocab_size) for start in starts)


def shard_of(group: Any) -> VocabShard:
    """What a user gave as `group`, of which only the process group itself is checked."""
    shard = group if isinstance(group, VocabShard) else VocabShard(group)
    if not distributed.is_available() or not isinstance(shard.group, distributed.ProcessGroup):
        raise TypeError(
            f"group is {type(shard.group).__name__}, expected a process group of torch.distributed that this process "
            "is in, or VocabShard(process_group, …)"
        )
    return shard


def check_shard(shard: VocabShard) -> None:
    for name, value in (("start", shard.start), ("vocab_size", shard.vocab_size)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{name} of VocabShard is {value!r}, expected an integer or None")


#: Of each group, what its ranks agreed on, by the digests of their messages; gone with the group.
_AGREED: "weakref.WeakKeyDictionary[Any, dict[tuple[int, ...], Layout]]" = weakref.WeakKeyDictionary()
#: Functions for which ranks that talk by NCCL alone have agreed on something.
_CALLED: "weakref.WeakKeyDictionary[Any, set[str]]" = weakref.WeakKeyDictionary()


def checked_on_all(function: str, shard: VocabShard, check: Callable[[], _Checked]) -> _Checked:
    """What `check` returns. If it raises, the other ranks are told."""
    try:
        return check()
    except Exception as error:
        if _talk_on_cpu(shard.group) or function not in _CALLED.get(shard.group, ()):
            problem = f"{type(error).__name__}: {error}"
            with contextlib.suppress(ValueError):
                _agree(function, shard.group, Message(problem=problem), ())
        raise


def agreed(
    function: str,
    group_name: str,
    start: int | None,
    vocab_size: int | None,
    rows: int,
    base_rows: int | None,
    same: tuple[tuple[str, str], ...],
    same_now: tuple[tuple[str, str], ...],
) -> Layout:
    """What the ranks agree on for calls such as this one, or ValueError on each: fields of Message.

    `same_now` is of this call alone. The group is given by name, and what is returned is a constant where a compiler
    looks on.
    """
    return _agree(function, group_of(group_name), Message(None, start, vocab_size, rows, base_rows, same), same_now)


# What torch.compiler.assume_constant_result does; that would import the compiler, as long as all of torch takes.
agreed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _agree(function: str, group: Any, message: Message, same_now: tuple[tuple[str, str], ...]) -> Layout:
    known, digest = _AGREED.setdefault(group, {}), _digest((function, message))
    key: tuple[int, ...] = (digest,)
    alike = True
    if _talk_on_cpu(group):
        told = gathered(torch.tensor([digest, _digest(same_now)]), group)
        key, alike = tuple(told[:, 0].tolist()), bool((told[:, 1] == told[0, 1]).all())
    if not alike or key not in known:
        whole = message._replace(same=(("the function", function), *message.same, *same_now))
        known[key] = layout_of(_told(group, whole))._replace(rank=group.rank())
        _CALLED.setdefault(group, set()).add(function)
    return known[key]


def _talk_on_cpu(group: Any) -> bool:
    """Whether ranks can tell each other something without waiting for their devices."""
    return "cpu:" in distributed.get_backend_config(group)


def _digest(x: Any) -> int:
    """63 bits, the same on every rank."""
    return int.from_bytes(hashlib.blake2b(repr(x).encode(), digest_size=8).digest(), "big") >> 1


def _told(group: Any, message: Message) -> list[Message]:
    """Those of all ranks, in their order."""
    text = json.dumps(message).encode()
    if len(text) > _MESSAGE_BYTES:
        # Six bytes are the most that JSON makes of a character.
        text = json.dumps(Message(problem=str(message.problem or message.same)[: _MESSAGE_BYTES // 8])).encode()
    device = torch.device("cpu" if _talk_on_cpu(group) else "cuda")
    sent = torch.frombuffer(bytearray(text.ljust(_MESSAGE_BYTES)), dtype=torch.uint8).to(device)
    told = [Message(*json.loads(bytes(row.tolist()))) for row in gathered(sent, group).cpu()]
    return [x._replace(same=tuple((name, value) for name, value in x.same)) for x in told]


def local_rows(x: Tensor, group_name: str, own: tuple[int, ...] | None, layout: Layout) -> Tensor:
    """Those of this rank's tokens, of a weight or bias that lies by `own`; None: whole on every rank."""
    starts, rank = layout.starts, layout.rank
    if own is None:
        if x.requires_grad:
            return torch.ops.dlogp.own_rows(x, group_name, starts)
        return x[starts[rank] : starts[rank + 1]]
    held = own[rank + 1] - own[rank]
    x = x if x.shape[0] == held else x[:held]
    return x if own == starts else torch.ops.dlogp.rows_of_ranks(x, group_name, own, starts)
