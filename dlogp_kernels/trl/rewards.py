"""Reward functions of the user, checked, and DAPO's overlong penalty."""

import contextlib
import functools
import inspect
import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference import grpo

OVERLONG_PENALTY = "overlong_penalty"


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The reward function, with errors that name it.

    It returns one reward for each response: a finite number, or None where it has nothing to say. The wrapper raises
    RuntimeError for what the function raises, TypeError or ValueError for what it returns instead.
    """
    name = getattr(function, "__name__", type(function).__name__)
    wrapper: Any
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):

        async def wrapper(**columns: Any) -> list[float | None]:
            with _errors_named(name):
                rewards = await function(**columns)
            return _as_rewards(name, rewards, len(columns["completions"]))

    else:

        def wrapper(**columns: Any) -> list[float | None]:
            with _errors_named(name):
                rewards = function(**columns)
            return _as_rewards(name, rewards, len(columns["completions"]))

    functools.update_wrapper(wrapper, function)
    # TRL names the logged rewards so.
    wrapper.__name__ = name
    return wrapper


def overlong_penalty(max_tokens: int, buffer: int, penalty: float) -> Callable[..., list[float]]:
    """DAPO's overlong penalty (`grpo.overlong_penalty`) as a reward function."""

    def overlong_penalty(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [-grpo.overlong_penalty(len(ids), max_tokens, buffer, penalty) for ids in completion_ids]

    return overlong_penalty


def without_scores_unpenalised(rewards: Tensor, penalty: int) -> Tensor:
    """Rewards (N, functions) with column `penalty` NaN where no other function scored the response.

    TRL takes a response with any score for a scored one.
    """
    others = torch.arange(rewards.shape[1], device=rewards.device) != penalty
    unscored = rewards[:, others].isnan().all(1, keepdim=True)
    return rewards.masked_fill(unscored & ~others, torch.nan)


def informative_groups(rewards: Tensor, weights: Tensor, group_size: int) -> Tensor:
    """(groups,), bool: whether the responses of a group differ in reward.

    Args:
        rewards: (N, functions), NaN where a function did not score a response; the members of a group are adjacent.
        weights: (functions,).
    """
    total = (rewards * weights.to(rewards)).nansum(1)
    scored = ~rewards.isnan().all(1)
    highest = total.masked_fill(~scored, -torch.inf).view(-1, group_size).amax(1)
    lowest = total.masked_fill(~scored, torch.inf).view(-1, group_size).amin(1)
    return highest > lowest


@contextlib.contextmanager
def _errors_named(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a user's code may raise anything
        raise RuntimeError(f"the reward function {name} raised {type(error).__name__}: {error}") from error


def _as_rewards(name: str, rewards: Any, count: int) -> list[float | None]:
    if isinstance(rewards, Tensor):
        rewards = rewards.tolist()
    if rewards is None or isinstance(rewards, str) or not hasattr(rewards, "__iter__"):
        raise TypeError(
            f"the reward function {name} returned {rewards!r}, expected a list of {count} rewards, one of each response"
        )
    rewards = list(rewards)
    if len(rewards) != count:
        raise ValueError(
            f"the reward function {name} returned {len(rewards)} rewards, expected {count}, one of each response"
        )
    return [_as_reward(name, place, reward) for place, reward in enumerate(rewards)]


def _as_reward(name: str, place: int, reward: Any) -> float | None:
    if reward is None:
        return None
    # Scalars of torch and numpy.
    reward = reward.item() if hasattr(reward, "item") else reward
    if not isinstance(reward, numbers.Real) or not math.isfinite(reward):
        raise ValueError(
            f"the reward function {name} returned {reward!r} for response {place}, expected a finite number, or None "
            "where it has nothing to say"
        )
    return float(reward)
