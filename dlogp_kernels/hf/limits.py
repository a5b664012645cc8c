"""What a model takes, known before its weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from .loading import context_length


class Limits(NamedTuple):
    """Rows of the last layer, and tokens of the context (None: no bound)."""

    vocabulary: int
    context: int | None


def model_limits(name_or_path: str | Path, *, trust_remote_code: bool = False) -> Limits:
    """The limits of a causal language model, from its config alone.

    Raises OSError where there is no config, ValueError where it is not that of a causal language model.
    """
    config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    rows = model.get_output_embeddings().weight.shape[0]
    padded_from = getattr(config.get_text_config(decoder=True), "unpadded_vocab_size", None)
    return Limits(min(rows, padded_from or rows), context_length(model))
