"""What a model takes, known before its weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from .heads import vocabulary_of
from .loading import context_length


class Limits(NamedTuple):
    """Rows of the last layer, and tokens of the context (None: no bound)."""

    vocabulary: int
    context: int | None


def model_limits(name_or_path: str | Path, *, trust_remote_code: bool = False) -> Limits:
    """The limits of a causal language model, from its config alone.

    Raises OSError where there is no config, ValueError where it is not that of a causal language model.
    """
    model = _without_weights(name_or_path, trust_remote_code)
    return Limits(vocabulary_of(model), context_length(model))


def lm_head_names(name_or_path: str | Path, *, trust_remote_code: bool = False) -> tuple[str, ...]:
    """How the names of the last layer's weight end, those of tied embeddings among them."""
    model = _without_weights(name_or_path, trust_remote_code)
    weight = model.get_output_embeddings().weight
    names = (name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is weight)
    return tuple(".".join(name.split(".")[-2:]) for name in names)


def _without_weights(name_or_path: str | Path, trust_remote_code: bool) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
