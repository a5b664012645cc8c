"""How a model is trained: the options of `dlogp train`, checked before anything is loaded."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..checks import check_factor, check_scale
from ..reference.policy import REWEIGHT_SIGNS, REWEIGHTS
from ..report.jsonl import MAX_LINE_BYTES
from .errors import JobError, check_option
from .graders import DEFAULT_GRADER_SECONDS


@dataclass(frozen=True)
class Training:
    """DAPO, with reweighted advantages.

    Args:
        steps: of the optimiser.
        prompts: problems in a batch of responses.
        samples: responses to each of them, at least 2; they are compared with each other.
        minibatches: optimiser steps in which a batch of responses is spent, in equal parts.
        micro_batch_size: responses in memory at once while learning; those of a step if None.
        max_new_tokens: after which a response ends unfinished.
        learning_rate: reached after `warmup_steps`, constant from then on.
        reweight, alpha, reweight_sign: as in `policy_loss`.
        clip_low, clip_high, dual_clip: bounds of the ratio.
        kl_beta: of the divergence to the base model; 0 for none.
        dynamic_sampling: drop problems whose responses are all worth the same, and draw others.
        overlong_buffer: tokens before max_new_tokens in which a penalty on the score grows from 0 to 1; 0 for none.
        temperature: > 0, of the draws and of the policy.
        seed: of the order of problems and of the draws.
        eval_every: steps between two measurements on held-out problems; there is one at the end in any case.
        eval_samples: responses to each held-out problem.
        save_every: steps between two checkpoints, which a kill can cost.
        gradient_checkpointing: less memory, more time.
        dtype: of the weights in memory: fp32 or bf16.
        device: where the model runs; CUDA if there is one, else the CPU.
        trust_remote_code: run code that comes with the model.
        grader_timeout: seconds that the grader may take for a response, before it is stopped and counted as one that
            raised; `exact` needs none.
        max_line_size: bytes that a line of the problems may have.
    """

    steps: int = 100
    prompts: int = 16
    samples: int = 16
    minibatches: int = 2
    micro_batch_size: int | None = None
    max_new_tokens: int = 1024
    learning_rate: float = 1e-6
    warmup_steps: int = 10
    reweight: str = "low_prob"
    alpha: float = 0.1
    reweight_sign: str = "both"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float = 10.0
    kl_beta: float = 0.0
    dynamic_sampling: bool = True
    overlong_buffer: int = 0
    temperature: float = 1.0
    seed: int = 0
    eval_every: int = 10
    eval_samples: int = 1
    save_every: int = 10
    gradient_checkpointing: bool = False
    dtype: str = "fp32"
    device: str | None = None
    trust_remote_code: bool = False
    grader_timeout: float = DEFAULT_GRADER_SECONDS
    max_line_size: int = MAX_LINE_BYTES

    @property
    def responses(self) -> int:
        """In a batch."""
        return self.prompts * self.samples

    @property
    def responses_per_step(self) -> int:
        return self.responses // self.minibatches

    @property
    def rows(self) -> int:
        """Responses in memory at once while learning."""
        return self.micro_batch_size or self.responses_per_step


def check_training(training: Training) -> None:
    """JobError that names the option for a value that can not be."""
    for name, least in (
        ("steps", 1), ("prompts", 1), ("samples", 2), ("minibatches", 1), ("max_new_tokens", 1), ("warmup_steps", 0),
        ("overlong_buffer", 0), ("eval_every", 1), ("eval_samples", 1), ("save_every", 1),
    ):  # fmt: skip
        _check(name, getattr(training, name), int, _within(least), f"an integer ≥ {least}, below 2**31")
    _check("max_line_size", training.max_line_size, int, lambda value: 1 <= value < 2**40, "an integer in [1, 2**40)")
    # NumPy's generators, which the trainer seeds too, take no more.
    _check("seed", training.seed, int, lambda value: 0 <= value < 2**32, "an integer in [0, 2**32)")
    for name, holds, expected in (
        ("learning_rate", lambda value: value > 0, "a number > 0"),
        ("alpha", lambda value: value >= 0, "a number ≥ 0"),
        ("clip_low", lambda value: 0 <= value < 1, "a number in [0, 1)"),
        ("clip_high", lambda value: value >= 0, "a number ≥ 0"),
        ("dual_clip", lambda value: value > 1, "a number > 1"),
        ("kl_beta", lambda value: value >= 0, "a number ≥ 0"),
        ("temperature", lambda value: value > 0, "a number > 0"),
        ("grader_timeout", lambda value: value > 0, "a number > 0"),
    ):
        _check(name, getattr(training, name), int | float, holds, expected)
    for name in ("alpha", "kl_beta"):
        check_option(check_factor, _option(name), getattr(training, name))
    check_option(check_scale, "--temperature", training.temperature)
    for name, choices in (("reweight", REWEIGHTS), ("reweight_sign", REWEIGHT_SIGNS), ("dtype", ("fp32", "bf16"))):
        value = getattr(training, name)
        if value not in choices:
            raise JobError(f"{_option(name)} is {value!r}, expected one of {', '.join(choices)}")
    if training.reweight == "dominate" and training.alpha > 1:
        raise JobError(f"--alpha is {training.alpha}, expected at most 1 for dominate")
    if training.overlong_buffer > training.max_new_tokens:
        raise JobError(
            f"--overlong-buffer is {training.overlong_buffer}, expected at most --max-new-tokens "
            f"({training.max_new_tokens})"
        )
    if training.responses % training.minibatches:
        raise JobError(
            f"--minibatches is {training.minibatches}, expected a divisor of the {training.responses} responses of a "
            "batch (--prompts × --samples)"
        )
    if training.micro_batch_size is not None:
        size = training.micro_batch_size
        _check("micro_batch_size", size, int, lambda value: value >= 1, "an integer ≥ 1")
        if training.responses_per_step % size:
            raise JobError(
                f"--micro-batch-size is {size}, expected a divisor of the {training.responses_per_step} responses of a "
                "step (--prompts × --samples ÷ --minibatches)"
            )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _within(least: int) -> Callable[[int], bool]:
    return lambda value: least <= value < 2**31


def _check(name: str, value: Any, kind: Any, holds: Callable[[Any], bool], expected: str) -> None:
    infinite = isinstance(value, float) and not math.isfinite(value)
    if isinstance(value, bool) or not isinstance(value, kind) or infinite or not holds(value):
        raise JobError(f"{_option(name)} is {value}, expected {expected}")
