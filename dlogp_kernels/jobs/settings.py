"""What a run draws with: the grid of settings, and what all its settings share. Checked before anything is loaded."""

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ..checks import check_drawing_temperature, check_factor
from ..reference.sampling import CRITERIA, WITH_THRESHOLD
from ..report.jsonl import MAX_LINE_BYTES
from ..report.responses import BASE, RL, Setting
from .errors import JobError, check_option
from .graders import DEFAULT_GRADER_SECONDS
from .inputs.models import DTYPES

#: Of float32, in which the ops compare.
_LARGEST = torch.finfo(torch.float32).max
_Number = TypeVar("_Number", int, float)
DEFAULT_MAX_NEW_TOKENS = 1024
DEFAULT_BATCH_SIZE = 64


@dataclass(frozen=True)
class Decoding:
    """What all settings of a run share.

    Args:
        temperature: ≥ 0 of both draws; 0 takes the most likely token.
        top_k, top_p, min_p: filters of both draws; 0, 1 and 0 switch them off.
        samples: responses to each problem, under each setting and seed.
        max_new_tokens: after which a response ends unfinished.
        stop_token_ids: tokens that end a response, itself included; those of both models if None.
        batch_size: responses decoded together at most.
        chunk_size: responses drawn between two writes to the disk, which a kill can cost; 4 · batch_size if None.
        dtype: of the weights in memory: auto (each checkpoint's own), bf16, fp16 or fp32.
        device: where the models run; CUDA if there is one, else the CPU.
        trust_remote_code: run code that comes with the models.
        grader_timeout: seconds that the grader may take for a response, before it is stopped and counted as one that
            raised; `exact` needs none.
        max_line_size: bytes that a line of the problems may have.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    samples: int = 1
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    stop_token_ids: Sequence[int] | None = None
    batch_size: int = DEFAULT_BATCH_SIZE
    chunk_size: int | None = None
    dtype: str = "auto"
    device: str | None = None
    trust_remote_code: bool = False
    grader_timeout: float = DEFAULT_GRADER_SECONDS
    max_line_size: int = MAX_LINE_BYTES

    @property
    def filters(self) -> dict[str, Any]:
        """The arguments of both draws, by the names that the op has for them."""
        return {
            "temperature": float(self.temperature),
            "top_k": self.top_k,
            "top_p": float(self.top_p),
            "min_p": float(self.min_p),
        }

    @property
    def problems_per_chunk(self) -> int:
        """Problems whose responses are written together; at least one."""
        return max(1, (self.chunk_size or 4 * self.batch_size) // self.samples)


def grid(
    criteria: Mapping[str, Sequence[float]],
    gammas: Iterable[float] = (0.0,),
    *,
    draft: str = "base",
    baselines: bool = True,
) -> list[Setting]:
    """Every criterion with each of its thresholds and each γ, each setting once.

    Args:
        criteria: thresholds by criterion; an empty sequence for `all` and `none`.
        gammas: of the extrapolation, 0 for none.
        draft: who drafts, base or rl.
        baselines: begin with the two models alone: `none` and `all` at γ = 0, drafted by the base model.

    Raises JobError for a criterion without the thresholds that it needs; the rest is checked by `check_settings`.
    """
    gammas = list(gammas)
    settings = [BASE, RL] if baselines else []
    for criterion, thresholds in criteria.items():
        if criterion in WITH_THRESHOLD and not thresholds:
            raise JobError(
                f"--criterion {criterion}: the threshold is missing, expected {criterion}:τ or {criterion}:τ,τ…"
            )
        # Where no token is replaced, there is nothing for γ to do.
        wanted = [0.0] if criterion == "none" else gammas
        settings += [
            Setting(criterion, threshold, float(gamma), draft)
            for threshold, gamma in itertools.product(thresholds or (None,), wanted)
        ]
    return list(dict.fromkeys(settings))


def parse_criteria(texts: Sequence[str]) -> dict[str, list[float]]:
    """Thresholds by criterion, for `grid`, of texts such as "delta_logp:-1,-0.5" or "all"; JobError for others."""
    criteria: dict[str, list[float]] = {}
    for text in texts:
        name, colon, thresholds = text.partition(":")
        if name in criteria:
            raise JobError(f"--criterion {name} is given twice, expected its thresholds in one list: {name}:τ,τ…")
        if name not in CRITERIA:
            raise JobError(f"--criterion is {name!r}, expected one of {', '.join(CRITERIA)}")
        criteria[name] = parse_numbers(f"--criterion {name}", thresholds, float) if colon else []
    return criteria


def parse_numbers(option: str, text: str, kind: type[_Number]) -> list[_Number]:
    """Numbers with commas between them; JobError that names the option for anything else."""
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise JobError(f"{option} is {text!r}, expected numbers with commas between them, such as 0 or 0,1") from error
    if len(set(numbers)) != len(numbers):
        raise JobError(f"{option} is {text!r}, in which a number is given twice, expected each once")
    return numbers


def check_settings(settings: Sequence[Setting], seeds: Sequence[int]) -> None:
    """JobError that names the option for what can not be; UserWarning for a threshold that hardly can."""
    if not settings:
        raise JobError("--criterion: there is no setting to draw with, expected at least one")
    if len(set(settings)) != len(settings):
        raise JobError("--criterion: a setting is given twice, expected each once")
    for setting in settings:
        _check_setting(setting)
    if not seeds:
        raise JobError("--seed: there is none, expected at least one")
    for seed in seeds:
        _check_integer("--seed", seed, 0, 2**64)
    if len(set(seeds)) != len(seeds):
        raise JobError("--seed: a seed is given twice, expected each once")


def _check_setting(setting: Setting) -> None:
    criterion, threshold, gamma, draft = setting
    if criterion not in CRITERIA:
        raise JobError(f"--criterion is {criterion!r}, expected one of {', '.join(CRITERIA)}")
    if criterion not in WITH_THRESHOLD and threshold is not None:
        raise JobError(f"--threshold is {threshold:g}, but the criterion {criterion} has none")
    if criterion in WITH_THRESHOLD and threshold is None:
        raise JobError(f"--threshold is missing: the criterion {criterion} compares with it")
    if threshold is not None:
        _check_threshold(criterion, threshold)
    _check_number("--gamma", gamma, lambda value: value >= 0, "≥ 0")
    check_option(check_factor, "--gamma", gamma)
    if draft not in ("base", "rl"):
        raise JobError(f"--draft is {draft!r}, expected base or rl")


def _check_threshold(criterion: str, threshold: float) -> None:
    if criterion == "random":
        _check_number("--threshold", threshold, lambda value: 0 <= value <= 1, "in [0, 1], a probability, for random")
        return
    _check_number(
        "--threshold",
        threshold,
        lambda value: abs(value) <= _LARGEST,
        "within the range of float32 (the criterion none replaces nowhere, all everywhere)",
    )
    if criterion == "delta_logp" and threshold >= 0:
        warnings.warn(
            f"--threshold is {threshold:g} for the criterion delta_logp: one that is not below 0 replaces nearly every "
            "token",
            stacklevel=3,
        )
    if criterion != "delta_logp" and threshold < 0:
        warnings.warn(
            f"--threshold is {threshold:g} for the criterion {criterion}, which is never below 0: every token is "
            "replaced",
            stacklevel=3,
        )


def check_decoding(decoding: Decoding) -> None:
    """JobError that names the option for a value that can not be."""
    _check_number("--temperature", decoding.temperature, lambda value: value >= 0, "≥ 0")
    check_option(check_drawing_temperature, "--temperature", decoding.temperature)
    _check_number("--top-p", decoding.top_p, lambda value: 0 < value <= 1, "in (0, 1]")
    _check_number("--min-p", decoding.min_p, lambda value: 0 <= value <= 1, "in [0, 1]")
    _check_integer("--top-k", decoding.top_k, 0, 2**31)
    for option in ("samples", "max_new_tokens", "batch_size"):
        _check_integer(f"--{option.replace('_', '-')}", getattr(decoding, option), 1, 2**31)
    if decoding.chunk_size is not None:
        _check_integer("--chunk-size", decoding.chunk_size, 1, 2**31)
    _check_number("--grader-timeout", decoding.grader_timeout, lambda value: value > 0, "> 0")
    _check_integer("--max-line-size", decoding.max_line_size, 1, 2**40)
    for token_id in decoding.stop_token_ids or ():
        _check_integer("--stop-token-id", token_id, 0, 2**31)
    if decoding.dtype not in DTYPES:
        raise JobError(f"--dtype is {decoding.dtype!r}, expected one of {', '.join(DTYPES)}")


def _check_number(option: str, value: float, holds: Callable[[float], bool], expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not holds(value):
        raise JobError(f"{option} is {value}, expected a number {expected}")


def _check_integer(option: str, value: int, low: int, end: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value < end:
        raise JobError(f"{option} is {value}, expected an integer in [{low}, 2**{end.bit_length() - 1})")
