"""The decoding loop for `model.generate(…, custom_generate=…)` of `transformers`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from .backbone import CACHE_NAMES
from .generation import OnStep, as_tokens, generate
from .heads import vocabulary_of

#: What the decoding loop does itself, by the config's numbers.
_PROCESSORS = ("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper")
_CRITERIA = ("MaxLengthCriteria", "EosTokenCriteria")
_INPUTS = ("attention_mask", "position_ids", "use_cache", "logits_to_keep")


@dataclass
class ExtrapolationOutput(ModelOutput):
    """With `return_dict_in_generate=True`: `sequences` (R, T_prompt + T), and the fields of `Generation`, (R, T)."""

    sequences: Tensor | None = None
    lengths: Tensor | None = None
    finished: Tensor | None = None
    draft_tokens: Tensor | None = None
    selected: Tensor | None = None
    delta_logp: Tensor | None = None
    logp: Tensor | None = None
    base_logp: Tensor | None = None


def custom_generate(
    base_model: nn.Module,
    *,
    seed: int,
    gamma: float = 0.0,
    criterion: str = "all",
    threshold: float | None = None,
    draft: str = "base",
    max_batch_size: int | None = None,
    streamer: BaseStreamer | None = None,
    on_step: OnStep | None = None,
) -> Callable[..., Tensor | ExtrapolationOutput]:
    """What `model.generate(input_ids, custom_generate=custom_generate(base_model, …))` takes, model the RL model.

    Args:
        base_model, gamma, criterion, threshold, draft, max_batch_size, on_step: as in `dlogp_kernels.hf.generate`.
        seed: of every call; `model.generate(…, seed=…)` overrides it.
        streamer: `model.generate` gives the prompt to its own `streamer` and does not pass it on: give it here.

    Length, do_sample, temperature, top_k, top_p, min_p, num_return_sequences, end-of-sequence and padding tokens are
    those of `model.generate` (where top_k is 50 unless it is set). Returns sequences as `model.generate` does, or an
    `ExtrapolationOutput`.

    The loop raises ValueError for what it does not do: beams, other logits processors, other stopping criteria.
    """
    given_seed = seed

    def loop(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        seed: int | None = None,
        **model_kwargs: Any,
    ) -> Tensor | ExtrapolationOutput:
        _check_supported(generation_config, logits_processor, stopping_criteria)
        _check_inputs(model_kwargs)
        samples = generation_config.num_return_sequences or 1
        mask = model_kwargs.get("attention_mask")
        # The rows come expanded, the samples of a prompt next to each other.
        result = generate(
            model,
            base_model,
            input_ids[::samples],
            None if mask is None else mask[::samples],
            gamma=gamma,
            criterion=criterion,
            threshold=threshold,
            draft=draft,
            **_sampling(generation_config),
            seed=given_seed if seed is None else seed,
            max_new_tokens=generation_config.max_length - input_ids.shape[1],
            # Those that can be drawn.
            stop_token_ids=[x for x in as_tokens(generation_config.eos_token_id) if x < vocabulary_of(model)],
            num_return_sequences=samples,
            max_batch_size=max_batch_size,
            streamer=streamer,
            on_step=on_step,
        )
        tokens = result.tokens.to(input_ids.device)
        padding = generation_config.pad_token_id
        # Some configs write −1 for none.
        if padding is not None and 0 <= padding < vocabulary_of(model):
            beyond = torch.arange(tokens.shape[1], device=tokens.device) >= result.lengths.to(tokens.device)[:, None]
            tokens = tokens.masked_fill(beyond, padding)
        sequences = torch.cat([input_ids, tokens], 1)
        if not generation_config.return_dict_in_generate:
            return sequences
        return ExtrapolationOutput(sequences, *result[1:])

    return loop


def _check_supported(config: GenerationConfig, processors: LogitsProcessorList, criteria: StoppingCriteriaList) -> None:
    if (config.num_beams or 1) > 1:
        raise ValueError(f"num_beams is {config.num_beams}, expected 1: extrapolation draws tokens one by one")
    for name, given, supported in (
        ("logits_processor", processors, _PROCESSORS),
        ("stopping_criteria", criteria, _CRITERIA),
    ):
        others = [type(x).__name__ for x in given or () if type(x).__name__ not in supported]
        if others:
            raise ValueError(
                f"{name} has {', '.join(others)}, expected none but {', '.join(supported)} (some options of generate "
                "add others)"
            )


def _check_inputs(inputs: Mapping[str, Any]) -> None:
    """ValueError for what would be left out: images, embeddings, a cache that holds tokens."""
    for name, value in inputs.items():
        if name in CACHE_NAMES and value is not None and value.get_seq_length() > 0:
            raise ValueError(f"{name} holds {value.get_seq_length()} tokens, expected none: pass the whole prompt")
        if name not in _INPUTS + CACHE_NAMES and value is not None:
            raise ValueError(f"{name} is given, expected only input_ids and {', '.join(_INPUTS)}")


def _sampling(config: GenerationConfig) -> dict[str, Any]:
    if not config.do_sample:
        return {"temperature": 0.0}
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    given = {name: getattr(config, name) for name in defaults}
    return defaults | {name: value for name, value in given.items() if value is not None}
