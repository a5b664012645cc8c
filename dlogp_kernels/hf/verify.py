"""Checks of each model, once, on a few tokens: that its logits are those of its hidden states and its last layer, and
that its key-value cache gives what one go gives (not all do)."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .backbone import backbone_of, evaluation, reshard_for_last_layer, run_backbone, run_backbone_in_chunks
from .heads import LmHead, LmHeadInputs, lm_head, unwrapped
from .lengths import picks_by_length, reset_frequencies, switch_lengths
from .loading import context_length

#: Tokens of which the logits are looked at, and how many of each row of logits.
_HEAD_TOKENS = 8
_CANDIDATES = 256
#: What rounding may do to a log-probability, over the largest logit of its row: a few roundings of the logits' dtype.
_LOGP_TOLERANCE = {torch.bfloat16: 2**-5, torch.float16: 2**-8, torch.float32: 1e-4, torch.float64: 1e-8}
#: What rounding in another order may do to a token's hidden state, over its size: it passes through every layer.
_HIDDEN_TOLERANCE = {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float32: 1e-3, torch.float64: 1e-7}
_UNSUPPORTED = "Such a model is not supported: use dlogp_kernels.delta_logp on its logits"

_verified: WeakKeyDictionary[PreTrainedModel, tuple[Any, ...]] = WeakKeyDictionary()
#: Tokens through the cache, how many at a time, and how many of them one by one.
_TOKENS, _CHUNK, _STEPS = 16, 3, 4
#: How often an error of hidden states may be what rounding does, for the worst and for the median token. In float32,
#: bfloat16 and float16 rounding alone makes it 3.4 and 2.1 of 130 architectures (9 where a router flips), and a cache
#: that loses something 1e5, at least 4 in the median where it drowns in bfloat16.
_WORST, _MEDIAN = 12.0, 3.0
_DISTURBANCES = 4

_Run = Callable[[Tensor], Tensor]

#: Up to how many tokens.
_verified_in_chunks: WeakKeyDictionary[PreTrainedModel, int] = WeakKeyDictionary()
_verified_decoding: WeakKeyDictionary[PreTrainedModel, int] = WeakKeyDictionary()


def verified_lm_head(model: nn.Module, tokens: Tensor) -> LmHead:
    """`lm_head(model)`, once the model's hidden states and last layer have been seen to give its own logits.

    The check runs at most 8 of `tokens` (1-dimensional) through the model, at the first call with it or with another
    last layer. Raises ValueError where log-probabilities disagree by more than rounding, or where a token's hidden
    state depends on later tokens.
    """
    causal_lm = unwrapped(model)
    reshard_for_last_layer(causal_lm)
    head = lm_head(model)
    layer = causal_lm.get_output_embeddings()
    signature = (type(layer), tuple(head.weight.shape), head.bias is None, head.softcap, head.logit_scale)
    if tokens.numel() and _verified.get(causal_lm) != signature:
        with torch.no_grad(), evaluation(causal_lm):
            own = _own_logits(causal_lm, repeated(tokens, _HEAD_TOKENS))
            _check_causal(causal_lm, repeated(tokens, _HEAD_TOKENS), own)
            _check_logits(causal_lm, head, repeated(tokens, _HEAD_TOKENS), own)
        _verified[causal_lm] = signature
    return head


class _OwnLogits(NamedTuple):
    """What a model computes by itself, and with what its forward does: the autocast, and the last layer's dtype."""

    logits: Tensor
    autocast: torch.autocast
    dtype: torch.dtype


def _own_logits(model: PreTrainedModel, input_ids: Tensor) -> _OwnLogits:
    """The logits' dtype does not tell the rest: accelerate's wrapper around the forward of a prepared model switches
    autocast on and returns float32, and FSDP casts weights before a forward and its output after it.
    """
    device_type, layer = input_ids.device.type, model.get_output_embeddings()
    within = []

    def look(*_: Any) -> None:
        enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
        within.append((torch.autocast(device_type, dtype=dtype, enabled=enabled), layer.weight.dtype))

    look()
    reset_frequencies(model)
    with backbone_of(model).register_forward_pre_hook(look), layer.register_forward_pre_hook(look):
        logits = model(input_ids=input_ids, use_cache=False).logits
    return _OwnLogits(logits, *within[-1])


def _check_causal(model: PreTrainedModel, input_ids: Tensor, own: _OwnLogits) -> None:
    half = _HEAD_TOKENS // 2
    alone, together = run_backbone(model, input_ids[:, :half]), run_backbone(model, input_ids)[:, :half]
    # Of the median token: a few may be sent to other experts by a rounding.
    error = float(token_errors(together, alone).median())
    if not error <= _tolerance(_HIDDEN_TOLERANCE, alone, own.dtype):
        raise ValueError(
            f"model is {type(model).__name__}: a token's hidden state changes by {error:.2g} of its size with the "
            "tokens after it, expected a causal language model (a masked language model or an encoder is not)"
        )


def _check_logits(model: PreTrainedModel, head: LmHead, input_ids: Tensor, own: _OwnLogits) -> None:
    logits = own.logits
    with own.autocast:
        hidden = run_backbone(model, input_ids)
        tolerance = _tolerance(_LOGP_TOLERANCE, hidden, logits.dtype, head.weight.dtype, own.dtype)
    if (logits.shape[-1], hidden.shape[-1]) != head.weight.shape:
        raise ValueError(
            f"model is {type(model).__name__}: its logits have {logits.shape[-1]} columns and its hidden states "
            f"{hidden.shape[-1]}, its last layer has shape {tuple(head.weight.shape)}; expected the same of both, and "
            f"nothing between them. {_UNSUPPORTED}"
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


def _tolerance(tolerances: Mapping[torch.dtype, float], hidden: Tensor, *dtypes: torch.dtype) -> float:
    """That of the coarsest dtype, of `hidden` or among the others, and of autocast where it is on."""
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        dtypes = *dtypes, torch.get_autocast_dtype(device_type)
    return max(tolerances[dtype] for dtype in (hidden.dtype, *dtypes))


def _logp_error(actual: Tensor, logits: Tensor, candidates: Tensor) -> float:
    """Largest error of log-probabilities `actual` (K,) of `candidates` (K,) over the largest logit of the row (V,)."""
    exact = logits.double()
    expected = exact[candidates] - exact.logsumexp(-1)
    largest = exact[exact.isfinite()].abs().amax().clamp_min(1.0)
    error = torch.where(actual == expected, 0.0, (actual - expected).abs())
    return float(error.max() / largest)


def verify_in_chunks(model: PreTrainedModel, tokens: Tensor, longest: int, prefill_chunk: int) -> None:
    """ValueError unless the model's key-value cache gives in chunks what it gives in one go.

    Looked at are 16 tokens, in one go and 3 at a time, and, where sequences of up to `longest` tokens go beyond a
    length at which the model may switch (a sliding window, …), 16 tokens more than that, `prefill_chunk` and half as
    many at a time: three runs of each, once.
    """
    if picks_by_length(model, longest):
        raise ValueError(
            f"model is {type(model).__name__}, whose attention picks among tokens of equal scores by the length of a "
            f"call: in chunks the numbers of {longest} tokens are not those of one go, expected prefill_chunk=None, or "
            "a memory_limit within which the sequence is run in one go"
        )

    def runs(length: int) -> tuple[_Run, _Run]:
        sizes = (None, _CHUNK) if length <= _TOKENS else (prefill_chunk, prefill_chunk // 2 or 2)
        whole, chunked = (partial(run_backbone, model, prefill_chunk=size) for size in sizes)
        return whole, chunked

    consequence = (
        "; its cache can not be used with prefill_chunk or a memory_limit below what the sequence takes in one go"
    )
    _verify(model, tokens, longest, _verified_in_chunks, runs, "in chunks its hidden states", consequence)


def verify_decoding(model: PreTrainedModel, tokens: Tensor, longest: int) -> None:
    """ValueError unless tokens that are fed one by one to the model's cache get what they get in one go.

    Looked at are 16 tokens, and 16 more than a length below `longest` at which the model may switch: three runs of
    each, once.
    """
    if model.base_model is model and not hasattr(model, "model"):
        # It has no backbone that could be looked at apart from its logits.
        return

    def runs(length: int) -> tuple[_Run, _Run]:
        ends = range(max(1, length - _STEPS), length + 1)
        return partial(run_backbone, model), partial(run_backbone_in_chunks, model, ends=ends)

    subject = "tokens that are fed one by one to its cache get hidden states that"
    _verify(model, tokens, longest, _verified_decoding, runs, subject, ": it can not generate")


def _verify(
    model: PreTrainedModel,
    tokens: Tensor,
    longest: int,
    verified: MutableMapping[PreTrainedModel, int],
    runs: Callable[[int], tuple[_Run, _Run]],
    subject: str,
    consequence: str,
) -> None:
    """Compare the two `runs` of each length to look at, unless the model was `verified` up to it before.

    `subject` and `consequence` are how the error begins and ends.
    """
    context = context_length(model)
    lengths = [min(_TOKENS, longest, context or _TOKENS)]
    crossed = [length for length in switch_lengths(model) if _TOKENS <= length < longest]
    if crossed:
        lengths.append(min(longest, crossed[-1] + _TOKENS))
    for length in lengths:
        if tokens.numel() and length > verified.get(model, 0):
            error = error_beyond_rounding(model, repeated(tokens, length), *runs(length))
            if error:
                raise ValueError(
                    f"model is {type(model).__name__}: {subject} differ by {error:.2g} of their size from those in one "
                    f"go, at {length} tokens, expected rounding only{consequence}"
                )
            verified[model] = length


def error_beyond_rounding(model: PreTrainedModel, input_ids: Tensor, expected: _Run, actual: _Run) -> float:
    """The relative error of the worst token if rounding does not explain it, else 0.

    `expected` and `actual` give hidden states or logits (1, T, D) for tokens (1, T'). What rounding does to them in
    this model is seen in a run in which the output of each module is disturbed by the spacing of its dtype. The worst
    token may be off by a few times that, the median token, which a state that is lost along the way shows, by less.
    Before it is said that they are off by more, other disturbances are tried: a router sends tokens to other experts in
    some of them.
    """
    with torch.no_grad(), evaluation(model):
        truth = expected(input_ids)
        error = token_errors(actual(input_ids), truth)
        worst = median = _spacing(truth.dtype)
        for seed in range(_DISTURBANCES):
            with _disturbed(model, seed):
                rounding = token_errors(expected(input_ids), truth)
            worst, median = max(worst, float(rounding.amax())), max(median, float(rounding.median()))
            if error.amax() <= _WORST * worst and error.median() <= _MEDIAN * median:
                return 0.0
    return float(error.amax())


def token_errors(hidden: Tensor, expected: Tensor) -> Tensor:
    """Relative errors of hidden states, token by token."""
    expected = expected.double()
    return ((hidden.double() - expected).norm(dim=-1) / expected.norm(dim=-1)).flatten()


def _spacing(dtype: torch.dtype) -> float:
    """Of float32 for wider ones: parts of a model compute in float32 whatever its dtype."""
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


@contextlib.contextmanager
def _disturbed(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Within this context each module's output is multiplied by 1 + ε u, u in [−1, 1], ε the spacing of its dtype."""
    generators: dict[torch.device, torch.Generator] = {}

    def disturb(module: nn.Module, inputs: Any, output: Any) -> Tensor | None:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return None
        if output.device not in generators:
            generators[output.device] = torch.Generator(output.device).manual_seed(seed)
        kind = torch.promote_types(output.dtype, torch.float32)
        uniform = torch.rand(output.shape, dtype=kind, device=output.device, generator=generators[output.device])
        return (output * (1 + _spacing(output.dtype) * (2 * uniform - 1))).to(output.dtype)

    with contextlib.ExitStack() as hooks:
        for module in backbone_of(model).modules():
            hooks.enter_context(module.register_forward_hook(disturb))
        yield


def repeated(tokens: Tensor, length: int) -> Tensor:
    """(1, length): the first tokens, repeated where there are fewer."""
    repeats = -(-length // tokens.numel())
    return tokens[:length].repeat(repeats)[None, :length]
