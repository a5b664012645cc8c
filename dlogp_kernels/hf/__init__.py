"""Causal language models of `transformers`: hidden states with their last layer, and the statistics of a pair."""

from ..installation import how_to_install

try:
    import safetensors  # noqa: F401
    import transformers  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"dlogp_kernels.hf needs {error.name}: {how_to_install('hf')}", name=error.name
    ) from error

from .custom import ExtrapolationOutput, custom_generate
from .extrapolation_processor import ExtrapolationLogitsProcessor
from .generation import Generation, generate
from .heads import LmHead, LmHeadInputs, lm_head
from .loading import check_same_tokenizer, context_length, load_model, load_tokenizer
from .metrics import lm_head_inputs, token_logp, token_metrics
from .store import HiddenStore, store_base_hidden

__all__ = [
    "ExtrapolationLogitsProcessor",
    "ExtrapolationOutput",
    "Generation",
    "HiddenStore",
    "LmHead",
    "LmHeadInputs",
    "check_same_tokenizer",
    "context_length",
    "custom_generate",
    "generate",
    "lm_head",
    "lm_head_inputs",
    "load_model",
    "load_tokenizer",
    "store_base_hidden",
    "token_logp",
    "token_metrics",
]
