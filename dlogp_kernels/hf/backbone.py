"""Running a model's backbone, which ends with the hidden states that the last layer reads."""

import contextlib
import inspect
from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..functional.dtensors import is_dtensor
from .documents import Batch, check_vocabulary
from .lengths import frequencies_of, reset_frequencies

#: What the forward of a model calls its cache: `transformers` 5.24 renamed it, and state-space models had their own.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")

_in_their_forward: WeakSet[nn.Module] = WeakSet()


def backbone_of(model: PreTrainedModel) -> nn.Module:
    """The part of a causal language model that ends with the hidden states which the last layer reads."""
    # Some classes name another attribute than the one that holds their backbone.
    backbone = model.base_model if model.base_model is not model else getattr(model, "model", model)
    if backbone is model:
        raise TypeError(
            f"model is {type(model).__name__}, which has no body apart from itself (base_model_prefix is "
            f"{model.base_model_prefix!r}): expected a causal language model with a last layer, such as "
            "AutoModelForCausalLM gives"
        )
    return backbone


def cache_name(accepted: Collection[str]) -> str:
    """The name among the parameters of a forward; the output has the cache under the same one."""
    return next((name for name in CACHE_NAMES if name in accepted), "past_key_values")


def run_backbone(model: PreTrainedModel, input_ids: Tensor, prefill_chunk: int | None = None) -> Tensor:
    """Hidden states (B, T, D) of tokens (B, T) without padding on the left, `prefill_chunk` tokens at a time."""
    length = input_ids.shape[1]
    if prefill_chunk is not None and prefill_chunk < length:
        return run_backbone_in_chunks(model, input_ids, [*range(prefill_chunk, length, prefill_chunk), length])
    backbone = backbone_of(model)
    reset_frequencies(model)
    parameters = inspect.signature(backbone.forward).parameters.values()
    takes_it = any(x.name == "use_cache" or x.kind is inspect.Parameter.VAR_KEYWORD for x in parameters)
    options = {"use_cache": False} if takes_it else {}
    return _last_hidden(_run_within(model, backbone, input_ids=input_ids, **options))


def run_backbone_in_chunks(model: PreTrainedModel, input_ids: Tensor, ends: Sequence[int]) -> Tensor:
    """Hidden states (B, T, D) of tokens (B, T), through the cache from each of `ends` to the next; the last is T."""
    backbone = backbone_of(model)
    accepted = inspect.signature(backbone.forward).parameters
    name = cache_name(accepted)
    cache: Any = None
    whole = torch.empty(0)
    with frequencies_of(model, input_ids.shape[1]):
        for begin, end in pairwise([0, *ends]):
            options: dict[str, Any] = {"use_cache": True, name: cache}
            # Backbones that do not name them count the cache's tokens.
            if "position_ids" in accepted:
                options["position_ids"] = torch.arange(begin, end, device=input_ids.device)[None]
            output = _run_within(model, backbone, input_ids=input_ids[:, begin:end], **options)
            cache = getattr(output, name, None)
            if cache is None:
                raise ValueError(
                    f"model is {type(model).__name__}, whose body gives no key-value cache, expected one that does: "
                    "prefill_chunk and generate need it"
                )
            chunk = _last_hidden(output)
            if begin == 0:
                whole = chunk.new_empty(*input_ids.shape, chunk.shape[-1])
            whole[:, begin:end] = chunk
    return whole


@contextlib.contextmanager
def in_own_forward(model: nn.Module) -> Iterator[None]:
    """Within this context, which is part of the model's own forward, FSDP has gathered what it gathers there."""
    _in_their_forward.add(model)
    try:
        yield
    finally:
        _in_their_forward.discard(model)


def _run_within(model: PreTrainedModel, backbone: nn.Module, **inputs: Any) -> Any:
    """`backbone(**inputs)`. FSDP gathers what is sharded in the model's own forward, so then it is called within."""

    def forward(**given: Any) -> Any:
        output = backbone(**given)
        _end_group(model, _last_hidden(output))
        return output

    if not hasattr(model, "unshard") or model in _in_their_forward:
        return forward(**inputs)
    before = model.__dict__.get("forward")
    model.forward = forward  # type: ignore[method-assign]
    try:
        return model(**inputs)
    finally:
        if before is None:
            del model.forward
        else:
            model.forward = before  # type: ignore[method-assign]
        reshard_for_last_layer(model)


def reshard_for_last_layer(model: PreTrainedModel) -> None:
    """Free what FSDP keeps gathered until backward, where it will not notice one: all before the last layer is frozen.

    A gathered weight of that layer would be trained in place of its shards, and the next step would begin with it.
    """
    if not hasattr(model, "unshard") or model in _in_their_forward:
        return
    if needs_gradient(model) and not needs_gradient(backbone_of(model)):
        modules: list[Any] = [model, model.get_output_embeddings()]
        for module in modules:
            if hasattr(module, "reshard"):
                module.reshard()


def _end_group(model: PreTrainedModel, hidden: Tensor) -> None:
    """Run the last layer, on nothing, where FSDP has gathered its weight together with those of other modules.

    It frees them when each has run; or in backward, where there will be one.
    """
    layer = model.get_output_embeddings()
    if hasattr(layer, "unshard") and not is_dtensor(layer.weight) and not torch.is_grad_enabled():
        layer(hidden[:0])


def check_tokens(batch: Batch, model: PreTrainedModel) -> None:
    """IndexError naming the first token beyond the model's embeddings, on the CPU; CUDA's own check is kept else."""
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if rows is not None and batch.input_ids.device.type == "cpu":
        check_vocabulary(batch, rows, f"the embeddings of {type(model).__name__}")


def check_prefill_chunk(prefill_chunk: int | None, model: nn.Module) -> None:
    """ValueError for a chunk < 1, RuntimeError where a gradient would be needed through the cache."""
    if prefill_chunk is None:
        return
    if isinstance(prefill_chunk, bool) or not isinstance(prefill_chunk, int) or prefill_chunk < 1:
        raise ValueError(f"prefill_chunk is {prefill_chunk!r}, expected a number of tokens ≥ 1 or None")
    if needs_gradient(model):
        raise RuntimeError(
            "prefill_chunk bounds the memory of inference; expected a call within torch.no_grad() or "
            "torch.inference_mode(), or prefill_chunk=None for gradients"
        )


def needs_gradient(model: nn.Module) -> bool:
    return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in model.parameters())


@contextlib.contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Within this context the model is in evaluation mode; each module's own mode is restored after it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _last_hidden(output: Any) -> Tensor:
    return output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
