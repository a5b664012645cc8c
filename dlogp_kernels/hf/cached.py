"""A causal language model with its key-value cache, for rows that come and go in the midst of their sequences.

All rows of a batch end at the same column; shorter ones have padding on the left, which is masked.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from .backbone import cache_name
from .heads import uncompiled, unwrapped
from .lengths import reset_frequencies, rope_side
from .loading import context_length
from .verify import error_beyond_rounding, repeated

#: Layers of a cache that can be taken apart by rows and put together; by name, as not every version has all of them.
_GROWS = ("DynamicLayer", "LinearAttentionAndFullAttentionLayer")
_SLIDES = ("DynamicSlidingWindowLayer", "LinearAttentionAndSlidingWindowAttentionLayer")
_FIXED = ("LinearAttentionLayer", "DummyLayer")
#: Beside its layers, a list with the state of some layers.
_LISTS = ("linear_cache",)
#: Tokens with which it is looked at what padding does, how many of them one by one, and beside how much padding.
_TOKENS, _STEPS, _PADDING = 16, 4, 3

_known_padding: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


@dataclass
class CachedRows:
    """Rows of one model in mid-sequence: its cache, `width` columns long, and the logits (b, V) of what comes next."""

    cache: Any
    width: int
    logits: Tensor

    def take(self, rows: Sequence[int]) -> "CachedRows":
        """Copies of some rows, in the given order; a row may be taken several times."""
        index = torch.tensor(rows, device=self.logits.device)
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        _replace_tensors(cache, lambda x: x.index_select(0, index.to(x.device)))  # layers may be on several
        return CachedRows(cache, self.width, self.logits.index_select(0, index))

    def resize(self, width: int) -> None:
        """Pad on the left, or drop columns there, which are padding in every row."""
        if width == self.width:
            return
        for layer in self.cache.layers:
            kind = type(layer).__name__
            if kind in _FIXED or layer.keys is None:
                continue
            columns = width
            if kind in _SLIDES:
                columns = min(width, layer.sliding_window - 1)
                layer.cumulative_length = width
            layer.keys, layer.values = _resized(layer.keys, columns), _resized(layer.values, columns)
        self.width = width

    def append(self, other: "CachedRows") -> None:
        """Put the rows of `other`, which is spent, behind these; both get the width of the wider."""
        width = max(self.width, other.width)
        self.resize(width)
        other.resize(width)
        _replace_tensors(self.cache, lambda *pair: torch.cat(pair), other.cache)
        self.logits = torch.cat([self.logits, other.logits])


class CachedModel:
    """Runs a model, a `torch.compile`d one too, on right-aligned rows; only the first `vocabulary` logits are kept."""

    def __init__(self, model: nn.Module, vocabulary: int | None = None) -> None:
        original = uncompiled(model)
        self.causal_lm = unwrapped(original)
        # The wrapper of a PEFT model adds nothing, that of torch.compile all there is to gain.
        self._call = self.causal_lm if original is model else model
        self._vocabulary = vocabulary
        self._accepted = inspect.signature(self.causal_lm.forward).parameters
        self._cache_name = cache_name(self._accepted)
        self._rope_side = rope_side(self.causal_lm)

    def prefill(self, prompts: Sequence[Tensor]) -> CachedRows:
        """Rows for prompts, 1-dimensional tensors of tokens, each ≥ 1 of them."""
        parts = self._parts([len(prompt) for prompt in prompts], prompts[0], [False] * len(prompts))
        return _run_apart(parts, lambda places: self._prefill([prompts[place] for place in places]))

    def advance(
        self, rows: CachedRows, tokens: Tensor, lengths: Sequence[int], row: Callable[[int], Tensor]
    ) -> CachedRows:
        """The rows, which are spent, after each is fed a token (b,); `lengths` are the tokens of each row, this one
        included, `row(place)` all of them."""
        crossing = [self.changes_within(length - 1, length) for length in lengths]
        parts = self._parts(lengths, tokens, crossing)
        if len(parts) == 1 and not crossing[0]:
            return self._forward(tokens[:, None], lengths, rows.cache, rows.width)

        def run(places: list[int]) -> CachedRows:
            if crossing[places[0]]:
                # Its keys have the frequencies of shorter rows.
                return self._prefill([row(place) for place in places])
            own = [lengths[place] for place in places]
            part = rows.take(places)
            part.resize(max(own) - 1)
            return self._forward(tokens[places][:, None], own, part.cache, part.width)

        return _run_apart(parts, run)

    def changes_within(self, begin: int, end: int) -> bool:
        """Whether a row of `end` tokens has other rotary frequencies than its first `begin` tokens."""
        return self._rope_side(begin) != self._rope_side(end)

    def _parts(self, lengths: Sequence[int], tokens: Tensor, crossing: Sequence[bool]) -> list[list[int]]:
        """Places of the rows that may be run together; those that are `crossing` a change of frequencies are apart."""
        alone = len(set(lengths)) > 1 and not _takes_padding(self.causal_lm, tokens)
        parts: dict[Any, list[int]] = {}
        for place, (length, crosses) in enumerate(zip(lengths, crossing, strict=True)):
            parts.setdefault((length if alone else 0, self._rope_side(length), crosses), []).append(place)
        return list(parts.values())

    def _prefill(self, prompts: Sequence[Tensor]) -> CachedRows:
        input_ids = pad_sequence(list(prompts), batch_first=True, padding_side="left")
        return self._forward(input_ids, [len(prompt) for prompt in prompts])

    def _forward(self, input_ids: Tensor, lengths: Sequence[int], cache: Any = None, width: int = 0) -> CachedRows:
        """Rows of these lengths after tokens (b, columns), which follow on those in the cache, `width` columns."""
        reset_frequencies(self.causal_lm)
        options: dict[str, Any] = {"use_cache": True, self._cache_name: cache}
        device, columns = input_ids.device, input_ids.shape[1]
        width += columns
        if "position_ids" in self._accepted:
            # Not all models count what is in their cache.
            options["position_ids"] = _positions(lengths, columns, device)
        # Without padding no mask is needed, which is the faster way.
        if min(lengths) < width and "attention_mask" in self._accepted and _has_columns(cache):
            end = torch.tensor(lengths, device=device)[:, None]
            options["attention_mask"] = (torch.arange(width, device=device) >= width - end).long()
        if "logits_to_keep" in self._accepted:
            options["logits_to_keep"] = 1
        output = self._call(input_ids=input_ids, **options)
        cache = getattr(output, self._cache_name, None)
        if cache is None or not hasattr(cache, "layers"):
            raise ValueError(
                f"model is {type(self.causal_lm).__name__}, which gives no key-value cache, expected a causal language "
                "model that does"
            )
        _check_layers(cache, self.causal_lm)
        return CachedRows(cache, width, output.logits[:, -1, : self._vocabulary])


def _takes_padding(model: PreTrainedModel, tokens: Tensor) -> bool:
    """Whether padding on the left, which is masked, changes nothing: some models count it as positions, in some the
    mask and the cache do not fit together. Looked at are 12 tokens and 4 one by one, three times, once."""
    if model not in _known_padding:
        cached = CachedModel(model)
        longest = min(_TOKENS, (context_length(model) or _TOKENS + _PADDING) - _PADDING)
        _known_padding[model] = longest <= _STEPS or not error_beyond_rounding(
            model,
            repeated(tokens, longest),
            partial(_stepwise, cached, padding=0),
            partial(_stepwise, cached, padding=_PADDING),
        )
    return _known_padding[model]


def _stepwise(cached: CachedModel, input_ids: Tensor, padding: int) -> Tensor:
    """Logits (1, 1 + steps, V) of a row after its first tokens and after each of the last, alone or padded beside a
    longer one."""
    prompt, last = input_ids[0, :-_STEPS], input_ids[0, -_STEPS:]
    prompts = [prompt, torch.cat([prompt[:1].repeat(padding), prompt])] if padding else [prompt]
    lengths = [len(prompt) for prompt in prompts]
    rows = cached._prefill(prompts)
    logits = [rows.logits[0]]
    for token in last:
        lengths = [length + 1 for length in lengths]
        rows = cached._forward(token.repeat(len(prompts), 1), lengths, rows.cache, rows.width)
        logits.append(rows.logits[0])
    return torch.stack(logits)[None]


def _run_apart(parts: Sequence[list[int]], run: Callable[[list[int]], CachedRows]) -> CachedRows:
    """The rows that `run` gives for the places of each part, put together in the order of their places."""
    rows = run(parts[0])
    if len(parts) == 1:
        return rows
    for part in parts[1:]:
        rows.append(run(part))
    order = [place for part in parts for place in part]
    return rows.take(sorted(range(len(order)), key=order.__getitem__))


def _positions(lengths: Sequence[int], columns: int, device: torch.device) -> Tensor:
    """(b, columns): the places in their rows of the last `columns` tokens; 0 for padding."""
    if min(lengths) == max(lengths):
        return torch.arange(lengths[0] - columns, lengths[0], device=device).expand(len(lengths), -1)
    end = torch.tensor(lengths, device=device)[:, None]
    return (end + torch.arange(-columns, 0, device=device)).clamp_min(0)


def _has_columns(cache: Any) -> bool:
    """Whether earlier tokens can be looked at, one by one: there are none, or attention keeps their keys."""
    return cache is None or any(getattr(layer, "keys", None) is not None for layer in cache.layers)


def _check_layers(cache: Any, model: PreTrainedModel) -> None:
    for name, value in vars(cache).items():
        values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        if name not in _LISTS and any(map(torch.is_tensor, values)):
            raise ValueError(
                f"model is {type(model).__name__}, whose {type(cache).__name__} keeps {name} beside its layers, "
                f"expected at most {', '.join(_LISTS)}"
            )
    for layer in cache.layers:
        kind = type(layer).__name__
        if kind not in _GROWS + _SLIDES + _FIXED:
            raise ValueError(
                f"model is {type(model).__name__}, whose cache has layers of type {kind}: expected "
                f"{', '.join(_GROWS + _SLIDES + _FIXED)}"
            )


def _replace_tensors(cache: Any, function: Callable[..., Tensor], *others: Any) -> None:
    """Put `function` of each tensor with rows of a cache, and of those at its place in `others`, in its place."""
    for parts in zip(*([x, *x.layers] for x in (cache, *others)), strict=True):
        vars(parts[0]).update(_mapped(function, *map(vars, parts)))


def _mapped(function: Callable[..., Tensor], value: Any, *others: Any) -> Any:
    """A tensor, or dictionaries and lists of tensors and of other things, which stay."""
    if isinstance(value, dict):
        return {name: _mapped(function, part, *(other[name] for other in others)) for name, part in value.items()}
    if isinstance(value, list):
        return [_mapped(function, *parts) for parts in zip(value, *others, strict=True)]
    return function(value, *others) if torch.is_tensor(value) and value.dim() > 1 else value


def _resized(x: Tensor, columns: int) -> Tensor:
    """x (b, heads, L, d) with L = `columns`: zeros on the left, or the last ones."""
    missing = columns - x.shape[-2]
    return nn.functional.pad(x, (0, 0, missing, 0)) if missing > 0 else x[..., -missing:, :]
