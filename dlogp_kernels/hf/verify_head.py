"""A check of each model, once, on a few tokens: its logits are those of its hidden states and its last layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .backbone import backbone_of, evaluation, run_backbone
from .heads import LmHead, LmHeadInputs, lm_head, unwrapped
from .verify_cache import repeated, token_errors

_TOKENS = 8
_CANDIDATES = 256
#: What rounding may do to a log-probability, over the largest logit of its row: a few roundings of the logits' dtype.
_LOGP_TOLERANCE = {torch.bfloat16: 2**-5, torch.float16: 2**-8, torch.float32: 1e-4, torch.float64: 1e-8}
#: What rounding in another order may do to a token's hidden state, over its size: it passes through every layer.
_HIDDEN_TOLERANCE = {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float32: 1e-3, torch.float64: 1e-7}
_UNSUPPORTED = "Such a model is not supported: use dlogp_kernels.delta_logp on its logits"

_verified: WeakKeyDictionary[PreTrainedModel, tuple[Any, ...]] = WeakKeyDictionary()


def verified_lm_head(model: nn.Module, tokens: Tensor) -> LmHead:
    """`lm_head(model)`, once the model's hidden states and last layer have been seen to give its own logits.

    The check runs at most 8 of `tokens` (1-dimensional) through the model, at the first call with it or with another
    last layer. Raises ValueError where log-probabilities disagree by more than rounding, or where a token's hidden
    state depends on later tokens.
    """
    causal_lm = unwrapped(model)
    head = lm_head(model)
    layer = causal_lm.get_output_embeddings()
    signature = (type(layer), tuple(head.weight.shape), head.bias is None, head.softcap, head.logit_scale)
    if tokens.numel() and _verified.get(causal_lm) != signature:
        with torch.no_grad(), evaluation(causal_lm):
            _check_causal(causal_lm, repeated(tokens, _TOKENS))
            _check_logits(causal_lm, head, repeated(tokens, _TOKENS))
        _verified[causal_lm] = signature
    return head


def _check_causal(model: PreTrainedModel, input_ids: Tensor) -> None:
    half = _TOKENS // 2
    alone, together = run_backbone(model, input_ids[:, :half]), run_backbone(model, input_ids)[:, :half]
    # Of the median token: a few may be sent to other experts by a rounding.
    error = float(token_errors(together, alone).median())
    if not error <= _tolerance(_HIDDEN_TOLERANCE, alone):
        raise ValueError(
            f"model is {type(model).__name__}: a token's hidden state changes by {error:.2g} of its size with the "
            "tokens after it, expected a causal language model (a masked language model or an encoder is not)"
        )


def _check_logits(model: PreTrainedModel, head: LmHead, input_ids: Tensor) -> None:
    logits, autocast = _own_logits(model, input_ids)
    with autocast:
        hidden = run_backbone(model, input_ids)
        tolerance = _tolerance(_LOGP_TOLERANCE, logits, hidden, head.weight)
    if hidden.shape[-1] != head.weight.shape[1]:
        raise ValueError(
            f"model is {type(model).__name__}: its hidden states have {hidden.shape[-1]} columns and its last layer "
            f"{head.weight.shape[1]}; expected nothing between the two. {_UNSUPPORTED}"
        )
    if logits.shape[-1] != head.weight.shape[0]:
        raise ValueError(
            f"model is {type(model).__name__}: its logits have {logits.shape[-1]} columns and its last layer "
            f"{head.weight.shape[0]} rows; expected the same. {_UNSUPPORTED}"
        )
    columns = torch.linspace(0, logits.shape[-1] - 1, _CANDIDATES, device=logits.device).long()
    candidates = torch.cat([columns.expand(*logits.shape[:2], -1), logits.argmax(-1, keepdim=True)], -1)
    actual = LmHeadInputs(hidden, *head).logp(candidates).logp
    error = max(_logp_error(*row) for row in zip(actual[0], logits[0], candidates[0], strict=True))
    if not error <= tolerance:
        raise ValueError(
            f"model is {type(model).__name__}: the log-probabilities of its logits differ by {error:.2g} of the "
            "largest logit from those of its body's hidden states and its last layer (softcap "
            f"{head.softcap}, logit_scale {head.logit_scale}); expected nothing else between the two. {_UNSUPPORTED}"
        )


def _own_logits(model: PreTrainedModel, input_ids: Tensor) -> tuple[Tensor, torch.autocast]:
    """The model's logits, and the autocast under which its forward computes them.

    accelerate's wrapper around the forward of a prepared model switches autocast on and returns float32, so that the
    logits' dtype does not tell.
    """
    device_type = input_ids.device.type
    within = []

    def look(*_: Any) -> None:
        dtype = torch.get_autocast_dtype(device_type)
        within.append(torch.autocast(device_type, dtype=dtype, enabled=torch.is_autocast_enabled(device_type)))

    look()
    handle = backbone_of(model).register_forward_pre_hook(look)
    try:
        logits = model(input_ids=input_ids, use_cache=False).logits
    finally:
        handle.remove()
    return logits, within[-1]


def _tolerance(tolerances: Mapping[torch.dtype, float], *tensors: Tensor) -> float:
    """That of the coarsest dtype among the tensors, and of autocast where it is on."""
    dtypes = {tensor.dtype for tensor in tensors}
    device_type = tensors[0].device.type
    if torch.is_autocast_enabled(device_type):
        dtypes.add(torch.get_autocast_dtype(device_type))
    return max(tolerances[dtype] for dtype in dtypes)


def _logp_error(actual: Tensor, logits: Tensor, candidates: Tensor) -> float:
    """Largest error of log-probabilities `actual` (K,) of `candidates` (K,) over the largest logit of the row (V,)."""
    exact = logits.double()
    expected = exact[candidates] - exact.logsumexp(-1)
    largest = exact[exact.isfinite()].abs().amax().clamp_min(1.0)
    error = torch.where(actual == expected, 0.0, (actual - expected).abs())
    return float(error.max() / largest)
