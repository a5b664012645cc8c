"""A causal language model with its key-value cache, for rows that come and go in the midst of their sequences.

All rows of a batch end at the same column; shorter ones have padding on the left, which is masked.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .cache_names import cache_name
from .heads import unwrapped

#: Layers of a cache that can be taken apart by rows and put together; by name, as not every version has all of them.
_GROWS = ("DynamicLayer", "LinearAttentionAndFullAttentionLayer")
_SLIDES = ("DynamicSlidingWindowLayer", "LinearAttentionAndSlidingWindowAttentionLayer")
_FIXED = ("LinearAttentionLayer", "DummyLayer")
_STATES = ("conv_states", "recurrent_states")


class CachedRows:
    """Rows of one model in mid-sequence: its cache, `width` columns long, and the logits (b, V) of what comes next."""

    def __init__(self, cache: Any, width: int, logits: Tensor) -> None:
        self.cache = cache
        self.width = width
        self.logits = logits

    def take(self, rows: Sequence[int]) -> CachedRows:
        """Copies of some rows, in the given order; a row may be taken several times."""
        index = torch.tensor(rows, device=self.logits.device)
        cache = copy.copy(self.cache)
        cache.layers = [_copied(layer) for layer in self.cache.layers]
        cache.reorder_cache(index)
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

    def append(self, other: CachedRows) -> None:
        """Put the rows of `other`, which is spent, behind these; both get the width of the wider."""
        width = max(self.width, other.width)
        self.resize(width)
        other.resize(width)
        for layer, joining in zip(self.cache.layers, other.cache.layers, strict=True):
            _append_layer(layer, joining)
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

    def prefill(self, prompts: Sequence[Tensor]) -> CachedRows:
        """Rows for prompts, 1-dimensional tensors of tokens, each ≥ 1 of them."""
        lengths = [len(prompt) for prompt in prompts]
        width = max(lengths)
        input_ids = torch.stack([nn.functional.pad(prompt, (width - len(prompt), 0)) for prompt in prompts])
        cache, logits = self._forward(input_ids, None, lengths, width)
        return CachedRows(cache, width, logits)

    def advance(self, rows: CachedRows, tokens: Tensor, lengths: Sequence[int]) -> None:
        """Feed each row a token (b,); `lengths` are the tokens of each row, this one included."""
        rows.cache, rows.logits = self._forward(tokens[:, None], rows.cache, lengths, rows.width + 1)
        rows.width += 1

    def _forward(self, input_ids: Tensor, cache: Any, lengths: Sequence[int], width: int) -> tuple[Any, Tensor]:
        """The cache, and logits (b, V) after the last column; `width` columns with those of the cache."""
        options: dict[str, Any] = {"use_cache": True, self._cache_name: cache}
        # Without padding the models count positions themselves and need no mask, which is the faster way.
        if min(lengths) < width:
            device = input_ids.device
            end = torch.tensor(lengths, device=device)[:, None]
            if "position_ids" in self._accepted:
                columns = torch.arange(-input_ids.shape[1], 0, device=device)
                options["position_ids"] = (end + columns).clamp_min(0)
            if "attention_mask" in self._accepted and _has_columns(cache):
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
        logits = output.logits[:, -1]
        return cache, logits if self._vocabulary is None else logits[:, : self._vocabulary]


def uncompiled(model: nn.Module) -> nn.Module:
    """The model that was given to `torch.compile`, or the model itself."""
    original = getattr(model, "_orig_mod", None)
    return original if isinstance(original, nn.Module) else model


def vocabulary_of(model: PreTrainedModel) -> int:
    """Columns of the model's logits.

    Raises TypeError where the model has no last layer.
    """
    layer = model.get_output_embeddings()
    if layer is None:
        raise TypeError(f"model is {type(model).__name__}, which has no last layer (get_output_embeddings is None)")
    # A quantised weight has another shape.
    rows = getattr(layer, "out_features", None) or layer.weight.shape[0]
    return min(rows, getattr(model.config.get_text_config(decoder=True), "unpadded_vocab_size", None) or rows)


def _has_columns(cache: Any) -> bool:
    """Whether earlier tokens can be looked at, one by one: there are none, or attention keeps their keys."""
    return cache is None or any(getattr(layer, "keys", None) is not None for layer in cache.layers)


def _check_layers(cache: Any, model: PreTrainedModel) -> None:
    for layer in cache.layers:
        kind = type(layer).__name__
        if kind not in _GROWS + _SLIDES + _FIXED:
            raise ValueError(
                f"model is {type(model).__name__}, whose cache has layers of type {kind}: expected "
                f"{', '.join(_GROWS + _SLIDES + _FIXED)}"
            )


def _copied(layer: Any) -> Any:
    """A layer that can change without the other; tensors are those of the other until they are replaced."""
    copied = copy.copy(layer)
    for name in _STATES:
        if hasattr(layer, name):
            setattr(copied, name, dict(getattr(layer, name)))
    return copied


def _resized(x: Tensor, columns: int) -> Tensor:
    """x (b, heads, L, d) with L = `columns`: zeros on the left, or the last ones."""
    missing = columns - x.shape[-2]
    return nn.functional.pad(x, (0, 0, missing, 0)) if missing > 0 else x[..., -missing:, :]


def _append_layer(layer: Any, joining: Any) -> None:
    if getattr(layer, "keys", None) is not None:
        layer.keys = torch.cat([layer.keys, joining.keys])
        layer.values = torch.cat([layer.values, joining.values])
    for name in _STATES:
        states = getattr(layer, name, {})
        for number, state in states.items():
            if state is not None:
                states[number] = torch.cat([state, getattr(joining, name)[number]])
