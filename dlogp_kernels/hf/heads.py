"""The last layer of a causal language model: its weight, its bias and what is done to the logits after it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..functional import linear_logp

#: Fields of a config that multiply the logits, and those that divide the logits (or, the same, the hidden states).
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
#: Model types whose code does not use a field as the others do.
_MULTIPLIES_BY_LOGITS_SCALING = ("hyperclovax",)
_IGNORES_LOGIT_SCALE = ("mpt",)

_PROBE_TOKENS = 8
_PROBE_CANDIDATES = 256
#: Error of a logit over the largest logit of its row that rounding may explain: a few roundings of the model's dtype.
_PROBE_TOLERANCE = {torch.bfloat16: 2**-5, torch.float16: 2**-8, torch.float32: 1e-4, torch.float64: 1e-4}


class LmHead(NamedTuple):
    """The last layer: logits = softcap · tanh(logit_scale · (hidden · weightᵀ + bias) / softcap).

    weight is (V, D), bias (V,) or None, softcap None where there is none, logit_scale 1.0 where there is none.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The `transformers` model itself: of a PEFT model the one whose layers its adapters were put into.

    Raises TypeError for anything else, and ValueError for an encoder-decoder or for prompts that are learned.
    """
    if "peft" in sys.modules:
        from peft import PeftModel

        if isinstance(model, PeftModel):
            if model.active_peft_config.is_prompt_learning:
                raise ValueError(
                    f"model has {model.active_peft_config.peft_type} adapters, which prepend virtual tokens: expected "
                    "adapters within the layers, such as LoRA"
                )
            model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model is {type(model).__name__}, expected a causal language model of transformers (PreTrainedModel), or "
            "a PeftModel of one; unwrap parallel wrappers first"
        )
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"model is {type(model).__name__}, an encoder-decoder: expected a causal language model, in which tokens "
            "are predicted from those before them"
        )
    return model


def body_of(model: PreTrainedModel) -> nn.Module:
    """The part of a causal language model that ends with the hidden states which the last layer reads."""
    body = model.base_model
    if body is model:
        raise TypeError(
            f"model is {type(model).__name__}, which has no body apart from itself (base_model_prefix is "
            f"{model.base_model_prefix!r}): expected a causal language model with a last layer, such as "
            "AutoModelForCausalLM gives"
        )
    return body


def lm_head(model: nn.Module) -> LmHead:
    """The last layer of a causal language model, as the ops take it.

    Args:
        model: a causal language model of `transformers`, or a PeftModel of one.

    Returns:
        LmHead: `weight` and `bias` are the model's own tensors, so gradients reach them (tied embeddings: the one
        tensor). A LoRA on the last layer is merged on the fly: `weight` is then a new (V, D) tensor, at least float32
        (a narrower one would round the adapter away), and gradients reach the adapter. A copy of the last layer in
        PEFT's `modules_to_save` is used where it is active.

    Raises:
        TypeError, ValueError: the model has no last layer, or one that is not a plain linear layer (quantised, sharded
            on other devices, an adapter that can not be merged).
    """
    causal_lm = unwrapped(model)
    layer = causal_lm.get_output_embeddings()
    if layer is None:
        raise TypeError(f"model is {type(causal_lm).__name__}, which has no last layer (get_output_embeddings is None)")
    weight, bias = _linear_parameters(layer)
    config = causal_lm.config.get_text_config(decoder=True)
    rows = getattr(config, "unpadded_vocab_size", None) or weight.shape[0]
    if rows < weight.shape[0]:
        weight, bias = weight[:rows], None if bias is None else bias[:rows]
    return LmHead(weight, bias, _softcap(config), _logit_scale(config))


def verified_lm_head(model: nn.Module, tokens: Tensor, run_body: Any) -> LmHead:
    """`lm_head(model)`, after a check, once a model, that hidden states and last layer give the model's own logits.

    The check runs at most 8 of `tokens` (1-dimensional) through the model. `run_body(model, input_ids)` gives the
    hidden states (B, T, D). Raises ValueError where log-probabilities disagree by more than rounding, or where a
    token's hidden state depends on later tokens.
    """
    causal_lm = unwrapped(model)
    head = lm_head(model)
    signature = (type(causal_lm.get_output_embeddings()), head.softcap, head.logit_scale, tuple(head.weight.shape))
    if tokens.numel() and _verified.get(causal_lm) != signature:
        with torch.no_grad(), _evaluation(causal_lm):
            _check_causal(causal_lm, tokens, run_body)
            _check_logits(causal_lm, head, tokens, run_body)
        _verified[causal_lm] = signature
    return head


_verified: WeakKeyDictionary[PreTrainedModel, tuple[Any, ...]] = WeakKeyDictionary()


def _softcap(config: Any) -> float | None:
    values = [float(getattr(config, name)) for name in _SOFTCAPS if getattr(config, name, None)]
    return values[0] if values else None


def _logit_scale(config: Any) -> float:
    multipliers, divisors = list(_MULTIPLIERS), list(_DIVISORS)
    if config.model_type in _MULTIPLIES_BY_LOGITS_SCALING:
        divisors.remove("logits_scaling")
        multipliers.append("logits_scaling")
    if config.model_type in _IGNORES_LOGIT_SCALE:
        multipliers.remove("logit_scale")
    scale = 1.0
    for name in multipliers:
        value = getattr(config, name, None)
        scale *= 1.0 if value is None else float(value)
    for name in divisors:
        value = getattr(config, name, None)
        scale /= 1.0 if value is None else float(value)
    return scale


def _linear_parameters(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight (V, D) and bias (V,) with which `layer` computes now."""
    if "peft" in sys.modules:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

        if isinstance(layer, ModulesToSaveWrapper):
            return _linear_parameters(_active_copy(layer))
        if isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper):
            return _merged_parameters(layer)
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        raise TypeError(
            f"the last layer is {_type_name(layer)}, expected torch.nn.Linear (a quantised last layer has to be "
            "dequantised first)"
        )
    weight = layer.weight
    if weight.is_meta:
        raise ValueError("the last layer's weight is on the meta device (offloaded?), expected it in memory")
    if not weight.is_floating_point():
        raise TypeError(f"the last layer's weight has dtype {weight.dtype}, expected a floating dtype (not quantised)")
    return weight, layer.bias


def _active_copy(wrapper: Any) -> nn.Module:
    """The module that PEFT's `modules_to_save` runs: the original, or the active adapter's copy."""
    names = [name for name in wrapper.active_adapters if name in wrapper.modules_to_save]
    return wrapper.original_module if wrapper.disable_adapters or not names else wrapper.modules_to_save[names[0]]


def _merged_parameters(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a last layer with an adapter of PEFT on it."""
    from peft.tuners.lora import Linear as LoraLinear

    if type(layer) is not LoraLinear:
        raise TypeError(
            f"the last layer has an adapter of type {_type_name(layer)}, expected none or LoRA on torch.nn.Linear: "
            "merge it first (merge_and_unload)"
        )
    weight, bias = _linear_parameters(layer.get_base_layer())
    if layer.merged and layer.disable_adapters:
        raise ValueError("the last layer's LoRA is merged and disabled at once: unmerge it first (unmerge_adapter)")
    if layer.merged or layer.disable_adapters:
        return weight, bias
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        if name in layer.lora_variant:
            raise TypeError(
                f"the last layer's adapter {name!r} is {type(layer.lora_variant[name]).__name__}, expected plain LoRA: "
                "merge it first (merge_and_unload)"
            )
        if layer.training and not isinstance(layer.lora_dropout[name], nn.Identity):
            raise ValueError(
                f"the last layer's adapter {name!r} has dropout, which can not be merged while training: expected "
                "lora_dropout=0 or model.eval()"
            )
        delta = layer.get_delta_weight(name)
        dtype = torch.promote_types(torch.promote_types(weight.dtype, delta.dtype), torch.float32)
        weight = weight.to(dtype) + delta.to(weight.device)
        adapter_bias = layer.lora_B[name].bias
        if adapter_bias is not None:
            adapter_bias = adapter_bias.to(dtype) * layer.scaling[name]
            bias = adapter_bias if bias is None else bias.to(dtype) + adapter_bias
    return weight, bias


def _type_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


@contextlib.contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Within this context the model is in evaluation mode; each module's own mode is restored after it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _probe_ids(tokens: Tensor) -> Tensor:
    """(1, 8): the first tokens, repeated where there are fewer."""
    repeats = -(-_PROBE_TOKENS // tokens.numel())
    return tokens.repeat(repeats)[None, :_PROBE_TOKENS]


def _check_causal(model: PreTrainedModel, tokens: Tensor, run_body: Any) -> None:
    input_ids = _probe_ids(tokens)
    half = _PROBE_TOKENS // 2
    alone = run_body(model, input_ids[:, :half]).double()
    together = run_body(model, input_ids)[:, :half].double()
    error = float((alone - together).abs().max() / alone.abs().max().clamp_min(1e-30))
    # Hidden states pass through every layer: more roundings than a logit's.
    if not error <= 4 * _PROBE_TOLERANCE[model.dtype]:
        raise ValueError(
            f"model is {type(model).__name__}: a token's hidden state changes by {error:.2g} of its size with the "
            "tokens after it, expected a causal language model (a masked language model or an encoder is not)"
        )


def _check_logits(model: PreTrainedModel, head: LmHead, tokens: Tensor, run_body: Any) -> None:
    input_ids = _probe_ids(tokens)
    logits = model(input_ids=input_ids, use_cache=False).logits.double()
    if logits.shape[-1] != head.weight.shape[0]:
        raise ValueError(
            f"model is {type(model).__name__}: its logits have {logits.shape[-1]} columns and its last layer "
            f"{head.weight.shape[0]} rows; expected the same"
        )
    columns = torch.linspace(0, logits.shape[-1] - 1, _PROBE_CANDIDATES, device=logits.device).long()
    candidates = torch.cat([columns.expand(*logits.shape[:2], -1), logits.argmax(-1, keepdim=True)], -1)
    expected = logits.log_softmax(-1).gather(-1, candidates)
    hidden = run_body(model, input_ids)
    actual = linear_logp(
        hidden, head.weight, candidates, bias=head.bias, softcap=head.softcap, logit_scale=head.logit_scale
    ).logp
    finite = logits.masked_fill(logits.isinf(), 0.0)
    error = float(((actual - expected).abs() / finite.abs().amax(-1, keepdim=True).clamp_min(1.0)).max())
    if not error <= _PROBE_TOLERANCE[model.dtype]:
        raise ValueError(
            f"model is {type(model).__name__}: the log-probabilities of its logits differ by {error:.2g} of the "
            "largest logit from those of its body's hidden states and its last layer (softcap "
            f"{head.softcap}, logit_scale {head.logit_scale}); expected nothing else between the two. Such a model is "
            "not supported: use dlogp_kernels.delta_logp on its logits"
        )
