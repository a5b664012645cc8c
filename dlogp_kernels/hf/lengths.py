"""Models in which the numbers of a token follow from the length of a call, not only from the tokens before it.

LongRoPE has two sets of rotary frequencies, for sequences up to a length and beyond it; dynamic NTK scaling has others
for every length beyond the one it was trained with, and keeps those of the longest call so far. Sparse attention with
an index picks among tokens of equal scores, of which there are many at 0, by the length of the call. What is run
together, and what is put into one cache, has to be on one side of such a length for each token to be as it is in its
row alone.
"""

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

#: The same for two lengths that may be run together.
Side = Callable[[int], tuple[int, ...]]
_RotaryModule = tuple[Any, str, str | None]

_known: WeakKeyDictionary[nn.Module, list[_RotaryModule]] = WeakKeyDictionary()
#: Numbers of a config beyond which attention or a recurrence goes another way.
_LENGTHS = re.compile(r"window|chunk|index_topk|block_size|compress")


class LengthSwitch(NamedTuple):
    """Calls of up to `length` tokens are alike. Longer ones are alike among themselves, or (`each`) where equal."""

    length: int
    each: bool


def rope_side(model: PreTrainedModel) -> Side:
    """Of the rotary frequencies: tokens at other sides of a sequence have to be computed again."""
    return _side([_rope_switch(*module) for module in _rotary_modules(model)])


def side_of(models: Sequence[PreTrainedModel]) -> Side:
    """Of all that follows from lengths: what may be run together in all `models`."""
    switches = [_rope_switch(*module) for model in models for module in _rotary_modules(model)]
    return _side([*switches, *map(_index_switch, models)])


def switch_lengths(model: PreTrainedModel) -> list[int]:
    """Numbers of tokens beyond which the model may go another way, rotary frequencies aside; sorted."""
    config = model.config.get_text_config(decoder=True).to_dict()
    found = {value for name, value in config.items() if _LENGTHS.search(name) and type(value) is int and value > 0}
    return sorted(found)


def picks_by_length(model: PreTrainedModel, length: int) -> bool:
    """Whether a call of `length` tokens picks those that attention sees by an index, and by its length."""
    switch = _index_switch(model)
    return switch is not None and length > switch.length


def reset_frequencies(model: PreTrainedModel) -> None:
    """Let go of the frequencies that dynamic NTK scaling keeps of a longer call."""
    for module, rope_type, layer_type in _rotary_modules(model):
        if "dynamic" in rope_type:
            options = {} if layer_type is None else {"layer_type": layer_type}
            first = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
            module(first.float(), position_ids=first, **options)


@contextlib.contextmanager
def frequencies_of(model: PreTrainedModel, length: int) -> Iterator[None]:
    """Within this context tokens have the rotary frequencies of a sequence of `length` tokens, wherever they stand."""

    def with_last(module: nn.Module, args: Any, named: Any) -> tuple[Any, Any]:
        # The last position of all shows the module how long the sequence is.
        call = inspect.signature(module.forward).bind(*args, **named)
        positions = call.arguments.get("position_ids")
        if positions is None:
            raise ValueError(
                f"{type(model).__name__}: its rotary frequencies follow the length of a sequence, which "
                f"{type(module).__name__} is not told, expected position_ids: its chunks can not be those of one go; "
                "give prefill_chunk=None"
            )
        call.arguments["position_ids"] = torch.cat([positions, torch.full_like(positions[..., :1], length - 1)], -1)
        return call.args, call.kwargs

    def without_last(module: nn.Module, args: Any, output: Any) -> Any:
        return tuple(x[..., :-1, :] for x in output) if isinstance(output, tuple) else output[..., :-1, :]

    reset_frequencies(model)
    switching = {module for module, kind, layer in _rotary_modules(model) if _rope_switch(module, kind, layer)}
    with contextlib.ExitStack() as hooks:
        for module in switching:
            hooks.enter_context(module.register_forward_pre_hook(with_last, with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(without_last))
        yield


def _side(switches: Sequence[LengthSwitch | None]) -> Side:
    distinct = list(dict.fromkeys(switch for switch in switches if switch is not None))
    return lambda length: tuple(0 if length <= end else length if each else 1 for end, each in distinct)


def _rotary_modules(model: PreTrainedModel) -> list[_RotaryModule]:
    """Modules that choose frequencies, with their kind of scaling for each type of layers (None: for all)."""
    if model not in _known:
        _known[model] = list(_find_rotary_modules(model))
    return _known[model]


def _find_rotary_modules(model: PreTrainedModel) -> Iterator[_RotaryModule]:
    for module in model.modules():
        kinds = getattr(module, "rope_type", None) if hasattr(module, "original_max_seq_len") else None
        if isinstance(kinds, str):
            yield module, kinds, None
        elif isinstance(kinds, dict):
            yield from ((module, kind, layer_type) for layer_type, kind in kinds.items())


def _rope_switch(module: Any, rope_type: str, layer_type: str | None) -> LengthSwitch | None:
    if "dynamic" in rope_type:
        return LengthSwitch(int(module.original_max_seq_len), each=True)
    if rope_type == "longrope":
        parameters = module.config.rope_parameters
        if layer_type is not None:
            parameters = parameters[layer_type]
        return LengthSwitch(int(parameters["original_max_position_embeddings"]), each=False)
    return None


def _index_switch(model: PreTrainedModel) -> LengthSwitch | None:
    topk = getattr(model.config.get_text_config(decoder=True), "index_topk", None)
    return None if topk is None else LengthSwitch(int(topk), each=True)
