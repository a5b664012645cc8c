"""The definition of every statistic in plain PyTorch: what the documentation means and the tests compare with.

Each function here has the signature of the public one, works in float64 as well, is differentiable by autograd, and
holds full logits. `logits_gradient` is the derivative that all backward kernels implement.
"""

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..results import DeltaLogpStats, LogpStats, present

_Stats = TypeVar("_Stats", LogpStats, DeltaLogpStats)


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any input is, else float32, whatever narrower type the inputs have."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def transform_logits(
    raw: Tensor, temperature: float = 1.0, softcap: float | None = None, logit_scale: float = 1.0
) -> Tensor:
    """z = softcap_c(logit_scale · raw) / temperature with softcap_c(x) = c·tanh(x / c)."""
    z = raw * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def transform_gradient(
    grad_z: Tensor, raw: Tensor, temperature: float, softcap: float | None, logit_scale: float
) -> Tensor:
    """The gradient with respect to `raw`, given that with respect to z of `transform_logits`."""
    grad = grad_z * (logit_scale / temperature)
    if softcap is not None:
        grad = grad * (1 - torch.tanh(raw * logit_scale / softcap).square())
    return grad


def linear_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """hidden · weightᵀ + bias, accumulated and returned in `dtype`."""
    raw = hidden.to(dtype) @ weight.to(dtype).t()
    return raw if bias is None else raw + bias.to(dtype)


class LogSoftmax(NamedTuple):
    """log p (N, V) of every token; the first with the largest z, that z, and Σ e^{z − largest} of all others (N, 1)."""

    logp_all: Tensor
    token: Tensor
    largest: Tensor
    rest: Tensor

    @property
    def lse(self) -> Tensor:
        return (self.largest + self.rest.log1p())[:, 0]


def log_softmax(z: Tensor) -> LogSoftmax:
    """Of z (N, V). The sum leaves out the largest term, a 1 in which those of the others would drown."""
    token = z.argmax(-1, keepdim=True)
    of_token = z.gather(-1, token)
    largest = of_token.detach()
    shift = largest.masked_fill(largest.isinf(), 0.0)  # ∞ − ∞ would be NaN
    others = (z - shift).scatter_(-1, token, -torch.inf).exp_().sum(-1, keepdim=True)
    of_largest = (of_token - shift).expm1_()  # 0, with the derivative of the largest term
    rest = others + of_largest
    return LogSoftmax((z - largest).sub_(rest.log1p()), token, largest, rest)


def logp_of_rows(z: Tensor, target: Tensor, ignore_index: int, top: bool = False) -> LogpStats:
    """Statistics of transformed logits z (N, V) with target (N, K), of rows that are not ignored as a whole."""
    return logp_stats(log_softmax(z), target, ignore_index, top)


def logp_stats(model: LogSoftmax, target: Tensor, ignore_index: int, top: bool) -> LogpStats:
    logp_all = model.logp_all
    stats = LogpStats(_gather(logp_all, target, ignore_index), _entropy(logp_all), model.lse)
    return stats._replace(**_top(model)) if top else stats


def delta_logp_of_rows(
    z: Tensor, base_z: Tensor, target: Tensor, ignore_index: int, top: bool = False
) -> DeltaLogpStats:
    """Statistics of two tensors of transformed logits (N, V) with target (N, K), likewise."""
    return delta_logp_stats(log_softmax(z), log_softmax(base_z), target, ignore_index, top)


def delta_logp_stats(
    model: LogSoftmax, base: LogSoftmax, target: Tensor, ignore_index: int, top: bool
) -> DeltaLogpStats:
    logp = _gather(model.logp_all, target, ignore_index)
    base_logp = _gather(base.logp_all, target, ignore_index)
    stats = DeltaLogpStats(
        delta_logp=logp - base_logp,
        logp=logp,
        base_logp=base_logp,
        entropy=_entropy(model.logp_all),
        base_entropy=_entropy(base.logp_all),
        kl=_kl(model.logp_all, base.logp_all),
        reverse_kl=_kl(base.logp_all, model.logp_all),
        lse=model.lse,
        base_lse=base.lse,
    )
    return stats._replace(**_top(model), **_top(base, "base_")) if top else stats


def _top(model: LogSoftmax, prefix: str = "") -> dict[str, Tensor]:
    """The most likely token, −1 where there are no numbers, and its log p; without a gradient."""
    logp = model.logp_all.detach().gather(-1, model.token)[:, 0]
    return {f"{prefix}top_token": model.token[:, 0].masked_fill(logp.isnan(), -1), f"{prefix}top_logp": logp}


def _gather(logp_all: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    ignored = target == ignore_index
    return logp_all.gather(1, target.masked_fill(ignored, 0)).masked_fill(ignored, 0.0)


def _entropy(logp_all: Tensor) -> Tensor:
    """−Σ p log p; a token with p = 0 contributes 0."""
    p = logp_all.exp()
    return -(p * logp_all.masked_fill(p == 0, 0.0)).sum(-1)


def _kl(logp_all: Tensor, other_logp_all: Tensor) -> Tensor:
    """Σ p (log p − log q) ≥ 0; a token with p = 0 contributes 0, one with p > 0 and q = 0 makes it +inf."""
    p = logp_all.exp()
    impossible = other_logp_all == -torch.inf
    difference = (logp_all - other_logp_all).masked_fill((p == 0) | impossible, 0.0)
    kl = (p * difference).sum(-1)
    kl = kl + (kl.clamp_min(0.0) - kl).detach()  # rounding may leave it below 0; its gradient stays
    return kl.masked_fill((impossible & (logp_all > -torch.inf)).any(-1), torch.inf)


def logits_gradient(
    logp_all: Tensor,
    entropy: Tensor,
    grad_logp_sum: Tensor,
    grad_entropy: Tensor,
    grad_lse: Tensor,
    other_logp_all: Tensor | None = None,
    kl: Tensor | None = None,
    grad_kl: Tensor | None = None,
    grad_reverse_kl: Tensor | None = None,
) -> Tensor:
    """∂/∂z of a model's statistics, without the −1 hot term of `logp` at its targets.

    dz = p·(−Σ_k g_logp − g_entropy·(log p + H) + g_lse) and, for a pair with q the other model's distribution, kl the
    divergence from p to q and reverse_kl that from q to p: + g_kl·p·(log p − log q − kl) + g_reverse_kl·(p − q).

    `logp_all` (N, V) may be any range of the vocabulary; all others are (N,).
    """
    p = logp_all.exp()
    finite_logp = logp_all.masked_fill(p == 0, 0.0)
    grad = p * ((grad_lse - grad_logp_sum)[:, None] - grad_entropy[:, None] * (finite_logp + entropy[:, None]))
    if other_logp_all is not None:
        assert kl is not None and grad_kl is not None and grad_reverse_kl is not None
        excess = (finite_logp - other_logp_all - kl[:, None]).masked_fill((p == 0) | (grad_kl == 0)[:, None], 0.0)
        difference = (p - other_logp_all.exp()).masked_fill_((grad_reverse_kl == 0)[:, None], 0.0)
        grad = grad + grad_kl[:, None] * p * excess + grad_reverse_kl[:, None] * difference
    return grad


def logp(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    top: bool = False,
) -> LogpStats:
    """`dlogp_kernels.logp` in plain PyTorch."""
    flat_target = _candidates(target, logits)
    rows = kept_rows(flat_target, ignore_index)
    z = transform_logits(_flat(logits)[rows].to(accumulation_dtype(logits)), temperature, softcap, logit_scale)
    stats = logp_of_rows(z, flat_target[rows], ignore_index, top)
    return _scatter(stats, rows, target, logits)


def delta_logp(
    logits: Tensor,
    base_logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    base_softcap: float | None = None,
    logit_scale: float = 1.0,
    base_logit_scale: float = 1.0,
    ignore_index: int = -100,
    top: bool = False,
) -> DeltaLogpStats:
    """`dlogp_kernels.delta_logp` in plain PyTorch."""
    dtype = accumulation_dtype(logits, base_logits)
    flat_target = _candidates(target, logits)
    rows = kept_rows(flat_target, ignore_index)
    z = transform_logits(_flat(logits)[rows].to(dtype), temperature, softcap, logit_scale)
    base_z = transform_logits(_flat(base_logits)[rows].to(dtype), temperature, base_softcap, base_logit_scale)
    stats = delta_logp_of_rows(z, base_z, flat_target[rows], ignore_index, top)
    return _scatter(stats, rows, target, logits)


def linear_logp(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    top: bool = False,
) -> LogpStats:
    """`dlogp_kernels.linear_logp` in plain PyTorch."""
    flat_target = _candidates(target, hidden)
    rows = kept_rows(flat_target, ignore_index)
    raw = linear_logits(_flat(hidden)[rows], weight, bias, accumulation_dtype(hidden, weight, bias))
    stats = logp_of_rows(transform_logits(raw, temperature, softcap, logit_scale), flat_target[rows], ignore_index, top)
    return _scatter(stats, rows, target, hidden)


def linear_delta_logp(
    hidden: Tensor,
    weight: Tensor,
    base_hidden: Tensor,
    base_weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    base_bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    base_softcap: float | None = None,
    logit_scale: float = 1.0,
    base_logit_scale: float = 1.0,
    ignore_index: int = -100,
    top: bool = False,
) -> DeltaLogpStats:
    """`dlogp_kernels.linear_delta_logp` in plain PyTorch."""
    dtype = accumulation_dtype(hidden, weight, base_hidden, base_weight, bias, base_bias)
    flat_target = _candidates(target, hidden)
    rows = kept_rows(flat_target, ignore_index)
    raw = linear_logits(_flat(hidden)[rows], weight, bias, dtype)
    base_raw = linear_logits(_flat(base_hidden)[rows], base_weight, base_bias, dtype)
    stats = delta_logp_of_rows(
        transform_logits(raw, temperature, softcap, logit_scale),
        transform_logits(base_raw, temperature, base_softcap, base_logit_scale),
        flat_target[rows],
        ignore_index,
        top,
    )
    return _scatter(stats, rows, target, hidden)


def kept_rows(target: Tensor, ignore_index: int) -> Tensor:
    """Indices of the rows of target (N, K) that have a candidate which is not ignored."""
    return (target != ignore_index).any(-1).nonzero().squeeze(-1)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _candidates(target: Tensor, rows: Tensor) -> Tensor:
    """target (…) or (…, K) as (N, K) for `rows` (…, D or V)."""
    return target.reshape(-1, 1) if target.dim() == rows.dim() - 1 else target.reshape(-1, target.shape[-1])


def _scatter(stats: _Stats, rows: Tensor, target: Tensor, source: Tensor) -> _Stats:
    """Statistics of the kept rows at their places among those of ignored ones."""
    placed = {name: _place(value, rows, target, source) for name, value in present(stats).items()}
    return stats._replace(**placed)


def _place(value: Tensor, rows: Tensor, target: Tensor, source: Tensor) -> Tensor:
    """Values of the kept rows at their places among 0, tokens among −1, in the shape of `target` or its leading one."""
    leading = source.shape[:-1]
    nothing = -1 if value.dtype == torch.int64 else 0
    full = value.new_full((leading.numel(), *value.shape[1:]), nothing).index_copy(0, rows, value)
    return full.view(target.shape) if value.dim() == 2 else full.view(leading)
