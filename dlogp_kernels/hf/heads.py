"""The last layer of a causal language model: its weight, its bias and what is done to the logits after it."""

import sys
from operator import mul, truediv
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..functional import linear_logp
from ..functional.dtensors import is_dtensor
from ..results import LogpStats

#: The target of a place where nothing is measured, as everywhere in `transformers`.
IGNORED = -100
#: Fields of a config that multiply the logits, and those that divide the logits (or, the same, the hidden states).
_SCALES = {
    "logit_scale": mul,
    "lm_head_multiplier": mul,
    "output_multiplier": mul,
    "logits_scaling": truediv,
    "logits_mup_width_multiplier": truediv,
}
#: Model types whose code does not use a field as the others do; None: not at all.
_OTHER_SCALES: dict[str, dict[str, Any]] = {"hyperclovax": {"logits_scaling": mul}, "mpt": {"logit_scale": None}}
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


class LmHead(NamedTuple):
    """The last layer: logits = softcap · tanh(logit_scale · (hidden · weightᵀ + bias) / softcap).

    weight is (V, D), bias (V,) or None, softcap None where there is none, logit_scale 1.0 where there is none.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0


class LmHeadInputs(NamedTuple):
    """What the ops take of a model: hidden (B, T, D), and the fields of `LmHead`."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float

    def logp(self, target: Tensor, *, temperature: float = 1.0, ignore_index: int = IGNORED) -> LogpStats:
        """`linear_logp` of these hidden states and this last layer, whatever it does to its logits.

        Args:
            target: (B, T) or (B, T, K); entry t is what follows token t, or `ignore_index`.
            temperature: > 0, divides the logits.
        """
        return linear_logp(target=target, temperature=temperature, ignore_index=ignore_index, **self._asdict())


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
            _check_sharded_within(model)
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


def _check_sharded_within(model: Any) -> None:
    """TypeError where FSDP2 gathers weights in the forward of a PeftModel, which nothing here calls."""
    only_there = hasattr(model, "unshard") and not hasattr(model.get_base_model(), "unshard")
    if only_there and any(map(is_dtensor, model.parameters())):
        raise TypeError(
            f"model is a {type(model).__name__} that FSDP2 has sharded as a whole, expected the model within it to be "
            "sharded: fully_shard(model.get_base_model())"
        )


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
    weight, bias = _linear_parameters(_lm_head_layer(causal_lm))
    config = causal_lm.config.get_text_config(decoder=True)
    return first_rows(LmHead(weight, bias, _softcap(config), _logit_scale(config)), vocabulary_of(causal_lm))


def vocabulary_of(model: PreTrainedModel) -> int:
    """Columns of the model's logits; TypeError where it has no last layer."""
    layer = _lm_head_layer(model)
    # A quantised weight has another shape.
    rows = getattr(layer, "out_features", None) or layer.weight.shape[0]
    return min(rows, getattr(model.config.get_text_config(decoder=True), "unpadded_vocab_size", None) or rows)


def lm_head_names(model: PreTrainedModel) -> tuple[str, ...]:
    """How the names of the last layer's weight end, those of tied embeddings among them."""
    weight = _lm_head_layer(model).weight
    names = (name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is weight)
    return tuple(".".join(name.split(".")[-2:]) for name in names)


def first_rows(head: LmHead, rows: int) -> LmHead:
    """The last layer of the first tokens of its vocabulary."""
    if head.weight.shape[0] == rows:
        return head
    return head._replace(weight=head.weight[:rows], bias=None if head.bias is None else head.bias[:rows])


def uncompiled(model: nn.Module) -> nn.Module:
    """The model that was given to `torch.compile`, or the model itself."""
    original = getattr(model, "_orig_mod", None)
    return original if isinstance(original, nn.Module) else model


def _lm_head_layer(model: PreTrainedModel) -> Any:
    layer = model.get_output_embeddings()
    if layer is None:
        raise TypeError(f"model is {type(model).__name__}, which has no last layer (get_output_embeddings is None)")
    return layer


def _softcap(config: Any) -> float | None:
    return next((float(getattr(config, name)) for name in _SOFTCAPS if getattr(config, name, None)), None)


def _logit_scale(config: Any) -> float:
    scale = 1.0
    for name, apply in (_SCALES | _OTHER_SCALES.get(config.model_type, {})).items():
        value = getattr(config, name, None)
        if apply is not None and value is not None:
            scale = apply(scale, float(value))
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
        if is_dtensor(delta) != is_dtensor(weight):
            raise TypeError(
                f"the last layer's weight is {type(weight).__name__} and what its adapter {name!r} adds is "
                f"{type(delta).__name__}, expected both or neither to be sharded: leave the last layer out of the "
                "adapter's target_modules, or merge it before the model is split (merge_and_unload)"
            )
        dtype = torch.promote_types(torch.promote_types(weight.dtype, delta.dtype), torch.float32)
        weight = weight.to(dtype) + delta.to(weight.device)
        adapter_bias = layer.lora_B[name].bias
        if adapter_bias is not None:
            adapter_bias = adapter_bias.to(dtype) * layer.scaling[name]
            bias = adapter_bias if bias is None else bias.to(dtype) + adapter_bias
    return weight, bias


def _type_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
