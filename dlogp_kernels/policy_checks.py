"""What is asked of the inputs and options of the policy losses, and the form in which their ops take them."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import (
    FLOATING,
    INTEGER,
    check_base_head,
    check_choice,
    check_factor,
    check_floating,
    check_integer,
    check_number,
    check_same_device,
    check_scale,
    check_storage,
    check_target_range,
    check_tensor,
    has_values,
)
from .reference.policy import BY_TOKENS, CHOICES, PolicyOptions, TokenInputs
from .reference.rows import MASKED
from .reference.statistics import accumulation_dtype


class Like(NamedTuple):
    """The tensor whose shape and device tokens have, and its name."""

    name: str
    tensor: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape


def check_options(**given: Any) -> PolicyOptions:
    """Of PolicyOptions' fields; a dual_clip of None is none."""
    if given["dual_clip"] is None:
        given["dual_clip"] = math.inf
    else:
        check_number("dual_clip", given["dual_clip"], 1.0, math.inf, low_included=False)
    options = PolicyOptions(**given)
    for name, choices in CHOICES.items():
        check_choice(name, given[name], choices)
    if options.reweight == "dominate":
        check_number("alpha", options.alpha, 0.0, 1.0)
    check_factor("alpha", options.alpha)
    check_number("clip_low", options.clip_low, 0.0, math.inf)
    check_number("clip_high", options.clip_high, 0.0, math.inf)
    check_factor("kl_beta", options.kl_beta)
    check_factor("entropy_coef", options.entropy_coef, -math.inf)
    check_scale("sapo_temperature_pos", options.sapo_temperature_pos)
    check_scale("sapo_temperature_neg", options.sapo_temperature_neg)
    if options.max_length is not None:
        check_integer("max_length", options.max_length, 1, 2**63)
    return options


def check_tokens(
    logp: Tensor,
    options: PolicyOptions,
    tokens: TokenInputs,
    num_tokens: float | Tensor | None,
    num_sequences: float | Tensor | None,
) -> TokenInputs:
    """Of `policy_loss`, with the denominator."""
    check_floating("logp", logp)
    like = Like("logp", logp)
    tokens = _check_tokens(like, options, tokens, "kl", tokens.kl)
    if options.entropy_coef != 0 and tokens.entropy is None:
        raise ValueError(f"entropy is None, expected a tensor: entropy_coef is {options.entropy_coef}")
    return _with_denominator(tokens, num_tokens, num_sequences, options.loss_type, like, (logp, *tokens))


def check_target_and_tokens(
    target: Tensor,
    hidden: Tensor,
    head: tuple[Tensor, Tensor, Tensor | None],
    base: tuple[Tensor | None, Tensor | None, Tensor | None],
    options: PolicyOptions,
    tokens: TokenInputs,
    num_tokens: float | Tensor | None,
    num_sequences: float | Tensor | None,
    *,
    vocabulary: int | None,
) -> tuple[Tensor, TokenInputs]:
    """Of `linear_policy_loss`: target as (N, 1) int64, MASKED where the mask is 0, and tokens with the denominator.

    A vocabulary of None is not known yet.
    """
    check_tensor("target", target, INTEGER, "an integer dtype")
    if target.shape != hidden.shape[:-1]:
        raise ValueError(
            f"target has shape {tuple(target.shape)}, expected {tuple(hidden.shape[:-1])} for hidden of shape "
            f"{tuple(hidden.shape)}"
        )
    check_same_device("target", target, "hidden", hidden)
    like = Like("target", target)
    tokens = _check_tokens(like, options, tokens, "base_hidden", base[0])
    if vocabulary is not None:
        check_masked_target(target, tokens.mask, vocabulary)
    targets = target.to(torch.int64).masked_fill(~tokens.mask, MASKED).reshape(-1, 1)
    floating = (*head, *base) if options.importance == "token" else (*head, *base, *tokens)
    return targets, _with_denominator(tokens, num_tokens, num_sequences, options.loss_type, like, floating)


def check_masked_target(target: Tensor, mask: Tensor, vocabulary: int) -> None:
    """IndexError for one that counts outside of the vocabulary; mask is bool."""
    if has_values(target):
        check_target_range(target, mask, vocabulary, "where the mask is 1: there is no ignore_index here")


def check_frozen_base(
    hidden: Tensor,
    weight: Tensor,
    base_hidden: Tensor | None,
    base_weight: Tensor | None,
    base_bias: Tensor | None,
    *,
    sharded: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """A reference model, which is given whole, fits, and requires no gradient, after autocast.

    Without one, None three times.
    """
    if base_hidden is None and base_weight is None and base_bias is None:
        return None, None, None
    if base_hidden is None or base_weight is None:
        name = "base_hidden" if base_hidden is None else "base_weight"
        raise ValueError(f"{name} is None, expected a tensor: the reference model has hidden states and a weight")
    base = check_base_head(hidden, weight, base_hidden, base_weight, base_bias, sharded=sharded)
    for name, x in (("base_hidden", base_hidden), ("base_weight", base_weight), ("base_bias", base_bias)):
        if x is not None:
            _check_constant(name, x)
    return base


def _check_tokens(
    like: Like, options: PolicyOptions, tokens: TokenInputs, exact_name: str, exact: Tensor | None
) -> TokenInputs:
    """Of both losses: mask as bool, offsets and group as int64. `exact` is what an exact divergence is made of."""
    _check_sequences(like, tokens.offsets)
    for name, x in (("entropy", tokens.entropy), ("kl", tokens.kl)):
        if x is not None:
            _check_per_token(name, x, like)
    if options.kl_beta != 0 and tokens.ref_logp is None and exact is None:
        raise ValueError(f"ref_logp is None, expected a tensor: kl_beta is {options.kl_beta}")
    if tokens.ref_logp is not None and exact is not None:
        raise ValueError(f"{exact_name} is given, expected None beside ref_logp: one divergence to one reference model")
    _check_per_token("old_logp", tokens.old_logp, like)
    _check_constant("old_logp", tokens.old_logp)
    for name, x in (("ref_logp", tokens.ref_logp), ("token_weight", tokens.token_weight)):
        if x is not None:
            _check_per_token(name, x, like)
            _check_constant(name, x)
    offsets, group = tokens.offsets, tokens.group
    sequences = like.shape[0] if offsets is None else offsets.shape[0] - 1
    _check_advantage(tokens.advantage, like, sequences)
    if options.reweight == "ppl" and group is None:
        raise ValueError("group is None, expected the prompts' ids: reweight 'ppl' standardises over a group")
    if options.denominator == "max_length" and offsets is not None and options.max_length is None:
        raise ValueError(
            f"max_length is None, expected a number: loss_type {options.loss_type!r} divides by it, and offsets are "
            "given"
        )
    mask = _mask_of(tokens.mask, like)
    if mask is tokens.mask and offsets is None and group is None:
        return tokens
    return tokens._replace(
        mask=mask,
        offsets=None if offsets is None else offsets.to(torch.int64),
        group=None if group is None else _group_of(group, sequences, like),
    )


def _check_per_token(name: str, x: Any, like: Like) -> None:
    """Floating, one number a token."""
    check_floating(name, x)
    if x.shape != like.shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected that of {like.name}, {tuple(like.shape)}")
    check_same_device(name, x, like.name, like.tensor)


def _check_constant(name: str, x: Any) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, expected a constant of the loss: pass {name}.detach()")


def _check_sequences(like: Like, offsets: Tensor | None) -> None:
    """Tokens (B, T), or (N,) with offsets (B + 1,)."""
    shape = tuple(like.shape)
    if offsets is None:
        if len(shape) != 2:
            raise ValueError(f"{like.name} has shape {shape}, expected (B, T), or (N,) with offsets")
        return
    if len(shape) != 1:
        raise ValueError(f"{like.name} has shape {shape}, expected (N,) with offsets")
    check_tensor("offsets", offsets, INTEGER, "an integer dtype")
    if offsets.dim() != 1 or offsets.shape[0] == 0:
        raise ValueError(f"offsets has shape {tuple(offsets.shape)}, expected (B + 1,)")
    check_same_device("offsets", offsets, like.name, like.tensor)
    if has_values(offsets):
        ends = offsets[0].item(), offsets[-1].item()
        if ends != (0, shape[0]) or bool((offsets.to(torch.int64).diff() < 0).any()):
            raise ValueError(
                f"offsets go from {ends[0]} to {ends[1]}, expected numbers from 0 to {shape[0]}, the tokens of "
                f"{like.name}, that do not decrease"
            )


def _check_advantage(advantage: Tensor, like: Like, sequences: int) -> None:
    check_floating("advantage", advantage)
    if advantage.shape != (sequences,) and advantage.shape != like.shape:
        raise ValueError(
            f"advantage has shape {tuple(advantage.shape)}, expected ({sequences},) or that of {like.name}, "
            f"{tuple(like.shape)}"
        )
    check_same_device("advantage", advantage, like.name, like.tensor)
    _check_constant("advantage", advantage)


def _mask_of(mask: Tensor, like: Like) -> Tensor:
    """As bool."""
    check_tensor("mask", mask, (torch.bool, *INTEGER, *FLOATING), "bool or 0/1")
    if mask.shape != like.shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected that of {like.name}, {tuple(like.shape)}")
    check_same_device("mask", mask, like.name, like.tensor)
    if mask.dtype == torch.bool:
        return mask
    counted = mask != 0
    if has_values(mask):
        wrong = counted & (mask != 1)
        if wrong.any():
            position = tuple(wrong.nonzero()[0].tolist())
            index = ", ".join(map(str, position))
            raise ValueError(f"mask[{index}] is {mask[position].item():g}, expected 0 or 1")
    return counted


def _group_of(group: Tensor, sequences: int, like: Like) -> Tensor:
    check_tensor("group", group, INTEGER, "an integer dtype")
    if group.shape != (sequences,):
        raise ValueError(f"group has shape {tuple(group.shape)}, expected ({sequences},), an id a response")
    check_same_device("group", group, like.name, like.tensor)
    return group.to(torch.int64)


def _with_denominator(
    tokens: TokenInputs,
    num_tokens: float | Tensor | None,
    num_sequences: float | Tensor | None,
    loss_type: str,
    like: Like,
    floating: tuple[Tensor | None, ...],
) -> TokenInputs:
    """Whichever of the two numbers the loss divides by, as a tensor () of the dtype that `floating` tensors give it."""
    given, unused = ("num_tokens", num_tokens), ("num_sequences", num_sequences)
    if loss_type not in BY_TOKENS:
        given, unused = unused, given
    if unused[1] is not None:
        raise ValueError(f"{unused[0]} is given, expected None: loss_type {loss_type!r} does not divide by it")
    if given[1] is None:
        return tokens
    return tokens._replace(denominator=_one_number(*given, like, accumulation_dtype(*floating)))


def _one_number(name: str, value: Any, like: Like, dtype: torch.dtype) -> Tensor:
    """As a tensor () of `dtype`."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.dtype not in (*INTEGER, *FLOATING):
            raise ValueError(f"{name} has dtype {value.dtype} and shape {tuple(value.shape)}, expected one number")
        check_same_device(name, value, like.name, like.tensor)
        _check_constant(name, value)
        check_storage(name, value)
        if has_values(value):
            _check_denominator(name, value.item())
        return value.reshape(()).to(dtype)
    _check_denominator(name, value)
    return torch.full((), float(value), dtype=dtype, device=like.tensor.device)


def _check_denominator(name: str, value: float) -> None:
    """0 where there is nothing to divide."""
    check_number(name, value, 0.0, math.inf)
    if value != 0:
        check_scale(name, value)
