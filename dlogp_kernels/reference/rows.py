"""What `linear_policy_loss` knows of each token before its logits: flat (N,) tensors, nothing waits for the device."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import policy as reference_policy
from .policy import PolicyOptions

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


def policy_rows(
    old_logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    offsets: Tensor | None,
    group: Tensor | None,
    ref_logp: Tensor | None,
    token_weight: Tensor | None,
    denominator: Tensor | None,
    options: PolicyOptions,
    dtype: torch.dtype,
) -> PolicyRows:
    """Of tokens (B, T), or packed (N,) with offsets (B + 1,)."""
    flat_mask = mask.reshape(-1)

    def flat(x: Tensor) -> Tensor:
        return x.reshape(-1).to(dtype).masked_fill(~flat_mask, 0.0)

    sequences = _Sequences(mask, offsets)
    counts, old = sequences.sums(flat_mask), flat(old_logp)
    of_sequences = advantage.shape == counts.shape
    longest = mask.shape[-1] if options.max_length is None else options.max_length
    scale = reference_policy.sequence_scale(
        counts, counts.sum(), counts.shape[0], longest, denominator, options.loss_type
    )
    score = None
    if options.reweight == "ppl":
        assert group is not None
        perplexity = -sequences.sums(old.double()) / counts.clamp_min(1)
        score = flat(sequences.spread(reference_policy.normalized_in_group(perplexity, group, counts > 0)))
    return PolicyRows(
        old,
        flat(sequences.spread(advantage) if of_sequences else advantage),
        flat(sequences.spread(scale)),
        score,
        None if ref_logp is None else flat(ref_logp),
        None if token_weight is None else flat(token_weight),
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
