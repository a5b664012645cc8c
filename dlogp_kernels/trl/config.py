"""The options of `ReweightedGRPOTrainer`: those of TRL's GRPOConfig, the reweighting, and what DAPO adds."""

import copy
import math
from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from ..checks import check_choice
from ..reference.policy import IMPORTANCES, LOSS_TYPES, REWEIGHT_SIGNS, REWEIGHTS


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class ReweightedGRPOConfig(GRPOConfig):
    """`trl.GRPOConfig` with the reweighted advantages of arXiv 2603.22117, Sec. 5, and DAPO's sampling.

    With `reweight="none"` and the other fields below as they are, training is TRL's own. DAPO as the paper runs it is
    `ReweightedGRPOConfig(epsilon_high=0.28, dual_clip=10.0, dynamic_sampling=True, overlong_buffer=…)`.

    Args:
        reweight: the factor on a token's advantage, p_old its probability when it was drawn: `low_prob` is
            1 + α (1 − p_old), `dominate` α p_old + 1 − α, `ppl` 1 − α s with s the response's log-perplexity
            normalised over its group, `none` 1.
        reweight_alpha: α. The paper takes 0.2 for Qwen2.5-Math-7B, 0.1 for Qwen3-8B-Base.
        reweight_sign: which advantages are reweighted: `both`, `positive` or `negative`.
        dual_clip: c > 1 or None: where Â < 0 the loss of a token is at most c |Â|. TRL's `delta` is the same and can be
            given instead.
        dynamic_sampling: drop groups whose rewards are all equal, without the overlong penalty, and draw responses to
            further prompts in their place, in an order of their own.
        max_refills: how often at most further prompts are drawn for one batch of responses. Places that are then still
            empty keep a dropped group, whose tokens are masked.
        overlong_buffer: tokens L before `max_completion_length` in which the overlong penalty grows from 0 to
            `overlong_penalty`; 0 for none.
        overlong_penalty: what is taken from the reward of a response of `max_completion_length` tokens.
        rollout_seed: None: responses are drawn by TRL, from torch's generator of the process. A number: they are drawn
            by `dlogp_kernels.hf.generate` with that seed's noise, so that they do not depend on the number of processes
            or on the batch size.
        delta_logp_responses: for how many responses of a process, out of each batch that is drawn, Δlog p to the policy
            at the start of training is logged. It costs their forward pass, and a copy of the trained parameters; 0 for
            neither.

    `importance_sampling_level` may also be `sequence_token`: the ratios of `sequence` (GSPO), with the gradient of each
    token's own log-probability (GSPO-token). Under `sequence` the gradient goes through the mean over the response, so
    that `low_prob` and `dominate` make no difference between its tokens.

    Raises ValueError for a value that can not be, by name.
    """

    reweight: str = _option("low_prob", "Factor on a token's advantage: low_prob, dominate, ppl or none.")
    reweight_alpha: float = _option(0.1, "α of the reweighting.")
    reweight_sign: str = _option("both", "Which advantages are reweighted: both, positive or negative.")
    dual_clip: float | None = _option(None, "Bound c > 1 of the loss over |Â| where Â < 0.")
    dynamic_sampling: bool = _option(False, "Drop groups whose rewards are all equal, and refill.")
    max_refills: int = _option(10, "How often at most further prompts are drawn for one batch of responses.")
    overlong_buffer: int = _option(0, "Tokens before max_completion_length in which the overlong penalty grows.")
    overlong_penalty: float = _option(1.0, "Overlong penalty of a response of max_completion_length tokens.")
    rollout_seed: int | None = _option(None, "Seed of noise that does not depend on the number of processes.")
    delta_logp_responses: int = _option(16, "Responses whose Δlog p to the start of training is logged.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("reweight", self.reweight, REWEIGHTS)
        check_choice("reweight_sign", self.reweight_sign, REWEIGHT_SIGNS)
        check_choice("loss_type", self.loss_type, LOSS_TYPES)
        check_choice("importance_sampling_level", self.importance_sampling_level, IMPORTANCES)
        for name in ("reweight_alpha", "overlong_penalty"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} is {value}, expected a finite number ≥ 0")
        for name in ("max_refills", "delta_logp_responses"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a number ≥ 0")
        longest = self.max_completion_length
        if self.overlong_buffer and (longest is None or not 0 < self.overlong_buffer <= longest):
            raise ValueError(
                f"overlong_buffer is {self.overlong_buffer}, expected 0 to max_completion_length ({longest})"
            )
        self._check_dual_clip()
        if self.use_adaptive_entropy:
            raise ValueError("use_adaptive_entropy is True, expected False: a constant entropy_coef is supported")
        if self.rollout_seed is not None:
            self._check_rollout_seed(self.rollout_seed)

    def for_tensor_parallel(self, copies: int) -> "ReweightedGRPOConfig":
        """A copy for processes of which so many at a time, a tensor-parallel group, have the same responses.

        TRL counts responses of all processes in `generation_batch_size`; the copy counts each once.
        """
        if self.rollout_seed is None:
            raise ValueError(
                f"rollout_seed is None with a model that {copies} processes have together, expected a number, by which "
                "they draw the same responses"
            )
        assert self.generation_batch_size and self.steps_per_generation and self.num_generations
        rows = self.per_device_train_batch_size * self.steps_per_generation
        if rows % self.num_generations:
            raise ValueError(
                f"per_device_train_batch_size × steps_per_generation is {rows} with a model that {copies} processes "
                f"have together, expected a multiple of num_generations ({self.num_generations})"
            )
        copied = copy.copy(self)
        copied.generation_batch_size = self.generation_batch_size // copies
        return copied

    def _check_dual_clip(self) -> None:
        if self.delta is not None:
            if self.dual_clip is not None:
                raise ValueError("dual_clip and delta are both given, expected one of them: they are the same bound")
            high = self.epsilon if self.epsilon_high is None else self.epsilon_high
            if self.delta < 1 + high:
                raise ValueError(f"delta is {self.delta}, expected at least 1 + epsilon_high ({1 + high})")
            self.dual_clip = self.delta
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip is {self.dual_clip}, expected a number > 1 or None")

    def _check_rollout_seed(self, seed: int) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
            raise ValueError(f"rollout_seed is {seed!r}, expected an integer in [0, 2**64) or None")
        for name, needed in (
            ("use_vllm", False),
            ("use_transformers_continuous_batching", False),
            ("repetition_penalty", 1.0),
            ("generation_kwargs", None),
        ):
            value = getattr(self, name)
            if value != needed:
                raise ValueError(f"rollout_seed is given together with {name} = {value!r}, expected {needed}")
