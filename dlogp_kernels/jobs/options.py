"""The options of each job, each with its default, help and bounds: the command line takes all of it from here.

So nothing heavy is imported here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from ..checks import check_drawing_temperature, check_factor, check_scale
from ..reference.policy import REWEIGHT_SIGNS, REWEIGHTS
from ..report.jsonl import MAX_LINE_BYTES
from .allowed import OneOf, all_of, at_least, check_options, integer, number, of_kind, option
from .errors import JobError
from .graders import DEFAULT_GRADER_SECONDS

_NOT_NEGATIVE = number("≥ 0", lambda value: value >= 0)
FACTOR = all_of(_NOT_NEGATIVE, check_factor)
_DRAWING_TEMPERATURE = all_of(_NOT_NEGATIVE, check_drawing_temperature)
_POSITIVE = number("> 0", lambda value: value > 0)
_TEMPERATURE = all_of(_POSITIVE, check_scale)
_ABOVE_ONE = number("> 1", lambda value: value > 1)
_BELOW_ONE = number("in [0, 1)", lambda value: 0 <= value < 1)
_MASS = number("in (0, 1]", lambda value: 0 < value <= 1)
_SHARE = number("in [0, 1]", lambda value: 0 <= value <= 1)
_DTYPE = OneOf(("auto", "bf16", "fp16", "fp32"), "one of bf16, fp16, fp32, auto")
_TOKENS = of_kind(int, "at least 1", lambda value: value >= 1)
_ROWS = of_kind(int, "an integer ≥ 1", lambda value: value >= 1)
_ON_ERROR = OneOf(("raise", "skip"), "raise or skip")

# Options that several jobs have.
_ABOUT_DTYPE = "Of the weights in memory; auto: of each model's files, so that none is rounded."
_dtype = partial(option, "auto", _ABOUT_DTYPE, _DTYPE)
_device = partial(option, None, "Such as cpu or cuda:1.", unset="cuda if there is one")
_trust_remote_code = partial(option, False, "Run code that comes with the models.")
_max_new_tokens = partial(option, 1024, "Tokens after which a response ends unfinished.")
_ABOUT_TIMEOUT = "Seconds for a response, after which a grader but exact is stopped, and counted."
_grader_timeout = partial(option, DEFAULT_GRADER_SECONDS, _ABOUT_TIMEOUT, _POSITIVE)
_ABOUT_LINES = "Longest line of JSONL in --data; a longer one can not be used."
_max_line_size = partial(option, MAX_LINE_BYTES, _ABOUT_LINES, integer(1, 2**40), in_bytes=True)


#: Of a batch by default: a CPU takes as long for few at a time as for many.
GPU_BATCH_TOKENS, CPU_BATCH_TOKENS = 8192, 1024
_memory_limit = partial(option, None, "Memory beyond the models, such as 4GiB.", unset="none", in_bytes=True)
_ABOUT_BATCH = "Tokens measured at once, padding included; a kill can cost 8 times as many."
_DEFAULT_BATCH = f"{GPU_BATCH_TOKENS}, on a CPU {CPU_BATCH_TOKENS}"
_batch_tokens = partial(option, None, _ABOUT_BATCH, _TOKENS, unset=_DEFAULT_BATCH)
_ABOUT_SEQUENTIAL = "One model in memory at a time, to measure; the base's hidden states go to disk."
_sequential = partial(option, False, _ABOUT_SEQUENTIAL)


@dataclass(frozen=True)
class Measuring:
    """What the numbers of `dlogp metrics` depend on beside models and data; `run_metrics` names the device."""

    memory_limit: int | None = _memory_limit()
    batch_tokens: int | None = _batch_tokens()
    dtype: str = _dtype()
    device: str = _device()
    sequential: bool = _sequential()
    on_error: str = option("raise", "For a line that can not be used.", _ON_ERROR)
    temperature: float = option(1.0, "Divides the logits of both models.", check_scale)
    trust_remote_code: bool = _trust_remote_code()
    max_line_size: int = _max_line_size()


@dataclass(frozen=True)
class Working:
    """Who computes what a run is made of, which is no part of what it is of: others may go on with it."""

    devices: str | None = option(
        None, "all, a number, or a list such as cuda:0,cuda:1: a worker each, that has the models.",
        unset="this process, on --device",
    )  # fmt: skip
    engine: str = option("local", "ray: workers are actors of Ray, which starts here.", OneOf(("local", "ray")))
    address: str | None = option(
        None, "Of a cluster of Ray that is there: auto, or host:port of its head node.", unset="none"
    )


@dataclass(frozen=True)
class Decoding:
    """What all settings of a run of `dlogp generate` or `dlogp sweep` share.

    Temperature and filters are of both draws; 0, 1 and 0 switch top_k, top_p and min_p off. A stop token is part of the
    response that it ends. `chunk_size` responses are written at once: a kill can cost so many. `exact` needs no time
    limit; a response that another grader takes longer for is counted as one at which it raised.
    """

    temperature: float = option(1.0, "Of the draws; 0 takes the most likely token.", _DRAWING_TEMPERATURE)
    top_k: int = option(0, "Draw from so many tokens at most; 0: from all.", integer(0))
    top_p: float = option(1.0, "Draw from the most likely tokens of this mass, in (0, 1].", _MASS)
    min_p: float = option(0.0, "Least probability, as a share of the largest one, in [0, 1].", _SHARE)
    samples: int = option(1, "Responses to each problem, under each setting and seed.", integer(1))
    max_new_tokens: int = _max_new_tokens(integer(1))
    stop_token_ids: Sequence[int] | None = option(
        None, "A token that ends a response; may be repeated.", integer(0), unset="those of both models",
        each="stop_token_id",
    )  # fmt: skip
    batch_size: int = option(64, "Responses decoded together at most.", integer(1))
    chunk_size: int | None = option(
        None, "Responses between two writes to the disk.", integer(1), unset="4 × --batch-size"
    )
    dtype: str = _dtype()
    device: str | None = _device()
    trust_remote_code: bool = _trust_remote_code()
    grader_timeout: float = _grader_timeout()
    max_line_size: int = _max_line_size()

    @property
    def problems_per_chunk(self) -> int:
        """Problems whose responses are written together; at least one. A kill can cost them."""
        return max(1, (self.chunk_size or 4 * self.batch_size) // self.samples)


@dataclass(frozen=True)
class Comparing(Decoding):
    """How `dlogp compare` draws responses, and with what it measures them."""

    memory_limit: int | None = _memory_limit()
    batch_tokens: int | None = _batch_tokens()
    sequential: bool = _sequential()


@dataclass(frozen=True)
class Training:
    """How `dlogp train` trains: DAPO, with reweighted advantages, as `policy_loss` has them.

    A batch has `samples` responses to each of `prompts` problems, which are compared with each other, and is spent in
    `minibatches` equal parts. The learning rate is reached after `warmup_steps`. Within `overlong_buffer` tokens of
    `max_new_tokens` a penalty on the score grows from 0 to 1. Held-out problems are measured at the end in any case.
    Adapters are scaled by 2 (α of LoRA is twice the rank), without dropout.
    """

    steps: int = option(100, "Steps of the optimiser.", at_least(1))
    prompts: int = option(16, "Problems in a batch of responses.", at_least(1))
    samples: int = option(16, "Responses to each of them.", at_least(2))
    minibatches: int = option(2, "Steps in which a batch of responses is spent.", at_least(1))
    micro_batch_size: int | None = option(
        None, "Responses in memory at once while learning.", _ROWS, unset="those of a step"
    )
    max_new_tokens: int = _max_new_tokens(at_least(1))
    learning_rate: float = option(1e-6, "After the warm-up; constant.", _POSITIVE)
    warmup_steps: int = option(10, "Steps in which the learning rate grows.", at_least(0))
    reweight: str = option(
        "low_prob",
        "low_prob: 1 + α (1 − p); dominate: α p + 1 − α; ppl: 1 − α · the response's log-perplexity within its group; "
        "none.",
        OneOf(REWEIGHTS),
    )
    alpha: float = option(0.1, "α of the reweighting.", FACTOR)
    reweight_sign: str = option("both", "Which advantages are reweighted.", OneOf(REWEIGHT_SIGNS))
    clip_low: float = option(0.2, "The ratio is clipped at 1 − this,", _BELOW_ONE)
    clip_high: float = option(0.28, "and at 1 + this.", _NOT_NEGATIVE)
    dual_clip: float = option(10.0, "Bound of the ratio where the advantage is negative.", _ABOVE_ONE)
    kl_beta: float = option(0.0, "Of the divergence to the base model; 0 for none.", FACTOR)
    dynamic_sampling: bool = option(True, "Drop problems whose responses are all worth the same, and draw others.")
    overlong_buffer: int = option(
        0, "Tokens before --max-new-tokens in which a penalty grows to 1; 0 for none.", at_least(0)
    )
    temperature: float = option(1.0, "Of the draws and of the policy.", _TEMPERATURE)
    # NumPy's generators, which the trainer seeds too, take no more.
    seed: int = option(0, "Of the order of problems and of the draws.", integer(0, 2**32))
    eval_every: int = option(10, "Steps between measurements on --eval-data.", at_least(1))
    eval_samples: int = option(1, "Responses to each held-out problem.", at_least(1))
    save_every: int = option(10, "Steps between checkpoints, which a kill can cost.", at_least(1))
    lora: int | None = option(
        None, "Train adapters of this rank (LoRA) instead of the weights; --out then holds MBs.", _ROWS,
        unset="the weights",
    )  # fmt: skip
    lora_targets: str | None = option(
        None, "Layers that get adapters, such as q_proj,v_proj.", unset="all linear ones but the last"
    )
    gradient_checkpointing: bool = option(False, "Less memory, more time.")
    dtype: str = option("fp32", "Of the weights in memory.", OneOf(("fp32", "bf16")))
    device: str | None = _device()
    trust_remote_code: bool = _trust_remote_code()
    grader_timeout: float = _grader_timeout()
    max_line_size: int = _max_line_size()

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
    """JobError that names the option for a value that can not be, or not beside another."""
    check_options(training)
    if training.lora_targets is not None and training.lora is None:
        raise JobError(f"--lora-targets is {training.lora_targets!r} without --lora, expected both")
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
    if training.responses_per_step % training.rows:
        raise JobError(
            f"--micro-batch-size is {training.micro_batch_size}, expected a divisor of the "
            f"{training.responses_per_step} responses of a step (--prompts × --samples ÷ --minibatches)"
        )
