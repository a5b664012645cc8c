"""How much of a batch is run at once within a limit of memory. Estimates from configs; bytes throughout."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from ..ops import backends
from .heads import LmHead

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_LEAST_WORKSPACE = 16 * 2**20
#: Tokens that are worth a pass over the weights, where the limit allows them.
_LEAST_CHUNK = 16
#: What the C library, PyTorch's thread pool and oneDNN's packed weights take beside tensors.
_OVERHEAD = 32 * 2**20
#: Bytes a token of targets, places and statistics.
_STATISTICS = 128


class Plan(NamedTuple):
    """Run `max_tokens` at once, `prefill_chunk` at a time, the ops in `workspace` bytes (None: as it is set)."""

    max_tokens: int
    prefill_chunk: int | None
    workspace: int | None


class BackboneSize(NamedTuple):
    """What running a backbone takes, in bytes.

    For a token of a call: its hidden state and its activations; for a token that it sees: its keys and values in the
    cache, and one layer's of them, one for each head; for a pair of both: its share of the attention.
    """

    hidden: int
    activations: int
    cache: int
    expanded: int
    attention: int


def as_bytes(limit: int | str, name: str = "memory_limit") -> int:
    """A number of bytes from an int or from text such as "512MiB" or "4 GB"; ValueError or TypeError with its name."""
    if isinstance(limit, bool) or not isinstance(limit, int | str):
        raise TypeError(f"{name} is {limit!r}, expected bytes (int) or text such as '4GiB'")
    if isinstance(limit, int):
        value = limit
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", limit)
        if match is None or match[2].upper() not in _UNITS:
            raise ValueError(f"{name} is {limit!r}, expected text such as '4GiB', '512MiB' or '2GB'")
        value = int(float(match[1]) * _UNITS[match[2].upper()])
    if value <= 0:
        raise ValueError(f"{name} is {limit!r}, expected more than 0 bytes")
    return value


def plan_memory(
    limit: int,
    backbones: Sequence[PreTrainedModel],
    heads: Sequence[LmHead],
    longest: int,
    tokens: int,
    *,
    beside: int = 0,
    gathered: int = 0,
) -> Plan:
    """The largest parts of a batch, of `tokens` in all and `longest` in one document, that fit in `limit` bytes.

    beside: bytes that are taken already. gathered: bytes a token of hidden states that are given and copied together.

    Raises ValueError where not even a few tokens at a time fit, with the least limit that would do.
    """
    sizes = [backbone_size(backbone) for backbone in backbones]
    fixed = (longest, beside, gathered)
    vocabulary = heads[0].weight.shape[0]
    # The plain PyTorch backend needs full rows of logits for at least one row.
    least_workspace = max(_LEAST_WORKSPACE, 64 * vocabulary)
    for max_tokens in _halvings(tokens):
        workspace = min(backends.DEFAULT_WORKSPACE, limit - _needed(sizes, max_tokens, *fixed))
        if workspace >= least_workspace:
            return Plan(max_tokens, max_tokens if max_tokens < longest else None, workspace)
    least = least_workspace + _needed(sizes, min(_LEAST_CHUNK, tokens), *fixed)
    raise ValueError(
        f"memory_limit is {limit} bytes, expected at least {least} ({least / 2**20:.0f} MiB) for a sequence of "
        f"{longest} tokens and a vocabulary of {vocabulary}"
    )


def backbone_size(model: PreTrainedModel) -> BackboneSize:
    """Estimated from the config and the dtype of a model, generously."""
    config: Any = model.config.get_text_config(decoder=True)
    width = config.hidden_size
    heads = getattr(config, "num_attention_heads", None) or 1
    head_dim = getattr(config, "head_dim", None) or width // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    layers = config.num_hidden_layers
    inner = _inner_size(config)
    item = model.dtype.itemsize
    queries, keys = heads * head_dim, kv_heads * head_dim
    return BackboneSize(
        hidden=width * item,
        # Residual, norm (in float32), projections with rotated copies; or residual, norm, gate, up and product.
        activations=width * (4 * item + 8) + max(4 * queries + 4 * keys, 3 * inner) * item,
        cache=2 * layers * keys * item,
        expanded=2 * (queries + keys) * item,
        # Scores and probabilities per head, unless the attention is fused; then a mask and its converted copy.
        attention=(heads * (item + 4 + item)) if config._attn_implementation == "eager" else 1 + 2 * item,
    )


def merged_bytes(model: PreTrainedModel, head: LmHead) -> int:
    """What `head` takes beside the model: nothing, unless an adapter was merged into a copy."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    tensors = [tensor for tensor in (head.weight, head.bias) if tensor is not None]
    return sum(tensor.nbytes for tensor in tensors if tensor.untyped_storage().data_ptr() not in own)


def _inner_size(config: Any) -> int:
    """Width of the feed-forward part as one token sees it: of its experts together."""
    dense = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or 4 * config.hidden_size
    expert = getattr(config, "moe_intermediate_size", None)
    chosen = getattr(config, "num_experts_per_tok", None)
    if chosen is None:
        return dense
    return max(dense, chosen * (expert or dense) + chosen * config.hidden_size)


def _halvings(tokens: int) -> list[int]:
    sizes = [tokens]
    while sizes[-1] > _LEAST_CHUNK:
        sizes.append(max(_LEAST_CHUNK, sizes[-1] // 2))
    return sizes


def _needed(sizes: Sequence[BackboneSize], max_tokens: int, longest: int, beside: int, gathered: int) -> int:
    """Beside the ops' workspace: both models' hidden states, and the larger backbone's run."""
    held = max(max_tokens, longest)
    run = 0
    for size in sizes:
        # One layer's keys and values exist twice while its cache grows, and may be expanded to every head.
        seen = size.expanded + (size.cache if max_tokens < longest else 0)
        run = max(run, longest * seen + max_tokens * (size.activations + size.attention * longest))
    return _OVERHEAD + beside + held * (sum(size.hidden for size in sizes) + gathered + _STATISTICS) + run
