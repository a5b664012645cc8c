"""The settings that a run draws with: a grid of criteria, thresholds and γ, checked before anything is loaded."""

import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import torch

from ..reference.sampling import CRITERIA, WITH_THRESHOLD
from ..report.responses import BASE, RL, Setting
from .allowed import OneOf, check_value, integer, number
from .errors import JobError
from .options import FACTOR

#: The largest number of float32, in which the ops compare.
_LARGEST = torch.finfo(torch.float32).max
_Number = TypeVar("_Number", int, float)
_SEED = integer(0, 2**64)
_CRITERION, _DRAFT = OneOf(CRITERIA), OneOf(("base", "rl"), "base or rl")
_PROBABILITY = number("in [0, 1], a probability, for random", lambda value: 0 <= value <= 1)
_THRESHOLD = number(
    "within the range of float32 (the criterion none replaces nowhere, all everywhere)",
    lambda value: abs(value) <= _LARGEST,
)


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
        check_value(_CRITERION, "--criterion", name)
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
        check_value(_SEED, "--seed", seed)
    if len(set(seeds)) != len(seeds):
        raise JobError("--seed: a seed is given twice, expected each once")


def _check_setting(setting: Setting) -> None:
    criterion, threshold, gamma, draft = setting
    check_value(_CRITERION, "--criterion", criterion)
    if criterion not in WITH_THRESHOLD and threshold is not None:
        raise JobError(f"--threshold is {threshold:g}, but the criterion {criterion} has none")
    if criterion in WITH_THRESHOLD and threshold is None:
        raise JobError(f"--threshold is missing: the criterion {criterion} compares with it")
    if threshold is not None:
        _check_threshold(criterion, threshold)
    check_value(FACTOR, "--gamma", gamma)
    check_value(_DRAFT, "--draft", draft)


def _check_threshold(criterion: str, threshold: float) -> None:
    if criterion == "random":
        check_value(_PROBABILITY, "--threshold", threshold)
        return
    check_value(_THRESHOLD, "--threshold", threshold)
    if criterion == "delta_logp" and threshold >= 0:
        reason = "delta_logp: one that is not below 0 replaces nearly every token"
    elif criterion != "delta_logp" and threshold < 0:
        reason = f"{criterion}, which is never below 0: every token is replaced"
    else:
        return
    warnings.warn(f"--threshold is {threshold:g} for the criterion {reason}", stacklevel=3)
