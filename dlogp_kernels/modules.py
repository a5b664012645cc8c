"""nn.Module forms of the functions: they hold the options and have no parameters."""

from typing import Any

from torch import Tensor, nn

from . import functional
from .results import DeltaLogpStats, LogpStats, PolicyLoss


class _Options(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


class _OneModelOptions(_Options):
    def __init__(
        self,
        *,
        temperature: float = 1.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        ignore_index: int = -100,
        top: bool = False,
    ) -> None:
        super().__init__(
            temperature=temperature, softcap=softcap, logit_scale=logit_scale, ignore_index=ignore_index, top=top
        )


class _PairOptions(_OneModelOptions):
    def __init__(
        self,
        *,
        temperature: float = 1.0,
        softcap: float | None = None,
        base_softcap: float | None = None,
        logit_scale: float = 1.0,
        base_logit_scale: float = 1.0,
        ignore_index: int = -100,
        top: bool = False,
    ) -> None:
        super().__init__(
            temperature=temperature, softcap=softcap, logit_scale=logit_scale, ignore_index=ignore_index, top=top
        )
        self.options |= {"base_softcap": base_softcap, "base_logit_scale": base_logit_scale}


class LinearLogp(_OneModelOptions):
    """Module form of `dlogp_kernels.linear_logp`."""

    def forward(self, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None) -> LogpStats:
        return functional.linear_logp(hidden, weight, target, bias=bias, **self.options)


class LinearDeltaLogp(_PairOptions):
    """Module form of `dlogp_kernels.linear_delta_logp`."""

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        base_hidden: Tensor,
        base_weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        base_bias: Tensor | None = None,
    ) -> DeltaLogpStats:
        return functional.linear_delta_logp(
            hidden, weight, base_hidden, base_weight, target, bias=bias, base_bias=base_bias, **self.options
        )


class Logp(_OneModelOptions):
    """Module form of `dlogp_kernels.logp`."""

    def forward(self, logits: Tensor, target: Tensor) -> LogpStats:
        return functional.logp(logits, target, **self.options)


class DeltaLogp(_PairOptions):
    """Module form of `dlogp_kernels.delta_logp`."""

    def forward(self, logits: Tensor, base_logits: Tensor, target: Tensor) -> DeltaLogpStats:
        return functional.delta_logp(logits, base_logits, target, **self.options)


class _PolicyOptions(_Options):
    def __init__(
        self,
        *,
        loss_type: str = "dapo",
        reweight: str = "low_prob",
        alpha: float = 0.1,
        reweight_sign: str = "both",
        clip_low: float = 0.2,
        clip_high: float = 0.28,
        dual_clip: float | None = None,
        importance: str = "token",
        kl_beta: float = 0.0,
        entropy_coef: float = 0.0,
        max_length: int | None = None,
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
    ) -> None:
        super().__init__(
            loss_type=loss_type,
            reweight=reweight,
            alpha=alpha,
            reweight_sign=reweight_sign,
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=dual_clip,
            importance=importance,
            kl_beta=kl_beta,
            entropy_coef=entropy_coef,
            max_length=max_length,
            sapo_temperature_pos=sapo_temperature_pos,
            sapo_temperature_neg=sapo_temperature_neg,
        )


class PolicyLossModule(_PolicyOptions):
    """Module form of `dlogp_kernels.policy_loss`."""

    def forward(
        self,
        logp: Tensor,
        old_logp: Tensor,
        advantage: Tensor,
        mask: Tensor,
        *,
        group: Tensor | None = None,
        ref_logp: Tensor | None = None,
        entropy: Tensor | None = None,
        kl: Tensor | None = None,
        token_weight: Tensor | None = None,
        num_tokens: float | Tensor | None = None,
        num_sequences: float | Tensor | None = None,
        offsets: Tensor | None = None,
    ) -> PolicyLoss:
        return functional.policy_loss(
            logp,
            old_logp,
            advantage,
            mask,
            group=group,
            ref_logp=ref_logp,
            entropy=entropy,
            kl=kl,
            token_weight=token_weight,
            num_tokens=num_tokens,
            num_sequences=num_sequences,
            offsets=offsets,
            **self.options,
        )


class LinearPolicyLoss(_PolicyOptions):
    """Module form of `dlogp_kernels.linear_policy_loss`; the keyword arguments are options of the loss."""

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        softcap: float | None = None,
        base_softcap: float | None = None,
        logit_scale: float = 1.0,
        base_logit_scale: float = 1.0,
        **policy: Any,
    ) -> None:
        super().__init__(**policy)
        self.options |= {
            "temperature": temperature,
            "softcap": softcap,
            "base_softcap": base_softcap,
            "logit_scale": logit_scale,
            "base_logit_scale": base_logit_scale,
        }

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        old_logp: Tensor,
        advantage: Tensor,
        mask: Tensor,
        *,
        bias: Tensor | None = None,
        base_hidden: Tensor | None = None,
        base_weight: Tensor | None = None,
        base_bias: Tensor | None = None,
        group: Tensor | None = None,
        ref_logp: Tensor | None = None,
        token_weight: Tensor | None = None,
        num_tokens: float | Tensor | None = None,
        num_sequences: float | Tensor | None = None,
        offsets: Tensor | None = None,
    ) -> PolicyLoss:
        return functional.linear_policy_loss(
            hidden,
            weight,
            target,
            old_logp,
            advantage,
            mask,
            bias=bias,
            base_hidden=base_hidden,
            base_weight=base_weight,
            base_bias=base_bias,
            group=group,
            ref_logp=ref_logp,
            token_weight=token_weight,
            num_tokens=num_tokens,
            num_sequences=num_sequences,
            offsets=offsets,
            **self.options,
        )
