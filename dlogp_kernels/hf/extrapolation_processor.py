"""Extrapolation for pipelines that take logits processors, with a key-value cache of the base model's own."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from .. import functional
from ..reference import sampling as reference_sample
from .backbone import evaluation
from .cached import CachedModel, CachedRows

#: Of those that need no token that was drawn before.
_CRITERIA = ("kl", "reverse_kl", "avg_kl", "entropy", "rl_entropy", "all")


class ExtrapolationLogitsProcessor(LogitsProcessor):
    """Makes `model.generate(logits_processor=[…])` of the RL model draw from softmax(((1 + γ) z_R − γ z_B) / T).

    The logits that `generate` gives are z_R; z_B is of `base_model`, which is run on each new token. With a criterion,
    rows where it does not hold get the logits of the model that drafts instead. Temperature, top-k, top-p and min-p are
    those of `generate`, which applies them after its processors: together with a draw it is `extrapolated_sample`, but
    for the noise. Logits are not normalised: with beams, which add them up, pass `renormalize_logits=True`.

    Args:
        base_model: a causal language model with the vocabulary of the model that generates.
        gamma: ≥ 0.
        criterion: `all`, `kl`, `reverse_kl`, `avg_kl`, `entropy` or `rl_entropy`, as in `extrapolated_sample`. Not
            `delta_logp`, which compares the probabilities of a token that the draft model drew before: a processor does
            not see a draw. `dlogp_kernels.hf.generate` and `custom_generate` do.
        threshold: τ of the criterion; None for `all`.
        draft: whose logits are left where the criterion does not hold, "base" or "rl".
        pad_token_id: tokens that a row begins with and that are this one are padding (a processor is not given the
            attention mask). By default that of base_model's generation config; −1 where nothing is padded.

    The cache is kept while each call's tokens are those of the last call and one more; otherwise (another batch, beams
    that changed places) the base model runs on the whole rows. A token with −inf stays ruled out.

    Raises ValueError, TypeError: an option that does not fit, by name; vocabularies that differ.
    """

    def __init__(
        self,
        base_model: nn.Module,
        *,
        gamma: float = 0.0,
        criterion: str = "all",
        threshold: float | None = None,
        draft: str = "base",
        pad_token_id: int | None = None,
    ) -> None:
        if criterion not in _CRITERIA:
            raise ValueError(
                f"criterion is {criterion!r}, expected one of {', '.join(_CRITERIA)}: a logits processor does not see "
                "which token is drawn; use dlogp_kernels.hf.generate, or custom_generate in model.generate"
            )
        self._cached = CachedModel(base_model)
        self._base = self._cached.causal_lm
        self._gamma = gamma
        self._criterion = criterion
        self._threshold = threshold
        self._draft = draft
        config = getattr(self._base, "generation_config", None)
        self._padding = pad_token_id if pad_token_id is not None else getattr(config, "pad_token_id", None)
        self._tokens = torch.empty(0, 0, dtype=torch.int64)
        self._lengths: list[int] = []
        self._rows: CachedRows | None = None
        # Errors of the options at once.
        zeros = torch.zeros(1, 1)
        functional.extrapolated_sample(
            zeros, zeros, gamma=gamma, criterion=criterion, threshold=threshold, draft=draft, seed=0
        )

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits to draw the next token from, (B, V), for rows of tokens (B, T) and the RL model's logits (B, V)."""
        base_logits = self._base_logits(input_ids)
        if base_logits.shape != scores.shape:
            raise ValueError(
                f"base_model has logits of shape {tuple(base_logits.shape)}, expected those of scores, "
                f"{tuple(scores.shape)}: one vocabulary"
            )
        base_logits = base_logits.to(scores.device, scores.dtype)
        extrapolated = reference_sample.extrapolated_logits(scores, base_logits, self._gamma)
        if self._criterion == "all":
            return extrapolated
        target = input_ids.new_zeros(len(scores))
        stats = functional.delta_logp(scores, base_logits, target)
        noise = torch.zeros(1, dtype=torch.int64, device=scores.device)
        selected = reference_sample.selected_rows(
            stats, stats.delta_logp, self._criterion, self._threshold, target, noise, noise
        )
        drafting = scores if self._draft == "rl" else base_logits.masked_fill(scores == -torch.inf, -torch.inf)
        return torch.where(selected[:, None], extrapolated, drafting)

    def _base_logits(self, input_ids: Tensor) -> Tensor:
        """The base model's logits (B, V) after each row."""
        tokens = input_ids.to(self._base.device)
        with evaluation(self._base):
            if self._rows is not None and self._goes_on(tokens):
                self._lengths = [length + 1 for length in self._lengths]
                row = partial(_row, tokens, self._lengths)
                self._rows = self._cached.advance(self._rows, tokens[:, -1], self._lengths, row)
            else:
                self._lengths = self._row_lengths(tokens)
                self._rows = self._cached.prefill([_row(tokens, self._lengths, i) for i in range(len(tokens))])
        self._tokens = tokens
        return self._rows.logits

    def _goes_on(self, tokens: Tensor) -> bool:
        known = self._tokens
        return tokens.shape == (known.shape[0], known.shape[1] + 1) and torch.equal(tokens[:, :-1], known)

    def _row_lengths(self, tokens: Tensor) -> list[int]:
        """Tokens of each row from the first one that is not padding; a row of padding alone keeps its last."""
        if self._padding is None:
            return [tokens.shape[1]] * len(tokens)
        kept = (tokens != self._padding).long().cummax(1).values
        return kept.sum(1).clamp_min(1).tolist()


def _row(tokens: Tensor, lengths: Sequence[int], place: int) -> Tensor:
    return tokens[place, tokens.shape[1] - lengths[place] :]
