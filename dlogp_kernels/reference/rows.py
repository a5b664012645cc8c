"""What `linear_policy_loss` knows of each token before its logits: flat (N,) tensors, nothing waits for the device."""

from typing import NamedTuple

import torch
from torch import Tensor

from .policy import PolicyOptions, TokenInputs, normalized_in_group, sequence_scale

#: Instead of the targets of tokens that do not count; no token has this id.
MASKED = -(2**63)


class PolicyRows(NamedTuple):
    """In the order of the op's arguments: scale is 1 / the denominator of the token's loss, score (for `ppl`) its
    response's normalised log-perplexity; whatever is masked is 0."""

    old_logp: Tensor
    advantage: Tensor
    scale: Tensor
    score: Tensor | None
    ref_logp: Tensor | None
    token_weight: Tensor | None


def policy_rows(tokens: TokenInputs, options: PolicyOptions, dtype: torch.dtype) -> PolicyRows:
    mask = tokens.mask.reshape(-1)

    def flat(x: Tensor) -> Tensor:
        return x.reshape(-1).to(dtype).masked_fill(~mask, 0.0)

    def flat_if_any(x: Tensor | None) -> Tensor | None:
        return None if x is None else flat(x)

    sequences = _Sequences(tokens.mask, tokens.offsets)
    counts, old_logp, advantage = sequences.sums(mask), flat(tokens.old_logp), tokens.advantage
    if advantage.shape == counts.shape:
        advantage = sequences.spread(advantage)
    longest = tokens.mask.shape[-1] if options.max_length is None else options.max_length
    scale = sequence_scale(counts, counts.sum(), counts.shape[0], longest, tokens.denominator, options.loss_type)
    score = None
    if options.reweight == "ppl":
        assert tokens.group is not None
        perplexity = -sequences.sums(old_logp.double()) / counts.clamp_min(1)
        score = sequences.spread(normalized_in_group(perplexity, tokens.group, counts > 0))
    return PolicyRows(
        old_logp,
        flat(advantage),
        flat(sequences.spread(scale)),
        flat_if_any(score),
        flat_if_any(tokens.ref_logp),
        flat_if_any(tokens.token_weight),
    )


class _Sequences:
    """Which tokens belong to which of B sequences."""

    def __init__(self, mask: Tensor, offsets: Tensor | None) -> None:
        self.shape, self.offsets = mask.shape, offsets
        if offsets is not None:
            places = torch.arange(mask.shape[0], device=mask.device)
            # The last sequence that begins at or before the token; empty ones begin where the next one does.
            self.index = torch.searchsorted(offsets[:-1].contiguous(), places, right=True) - 1

    def sums(self, x: Tensor) -> Tensor:
        """Of the tokens x (N,) of each sequence (B,)."""
        if self.offsets is None:
            return x.view(self.shape).sum(-1)
        total = x.cumsum(0)
        return torch.cat([total.new_zeros(1), total])[self.offsets].diff()

    def spread(self, x: Tensor) -> Tensor:
        """What is of each sequence (B,), at each token."""
        return x[:, None].expand(self.shape) if self.offsets is None else x[self.index]
