"""nn.Module forms of the functions: they hold the options and have no parameters."""

from typing import Any

from torch import Tensor, nn

from . import functional
from .results import DeltaLogpStats, LogpStats


class _OneModelOptions(nn.Module):
    def __init__(
        self,
        *,
        temperature: float = 1.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "temperature": temperature,
            "softcap": softcap,
            "logit_scale": logit_scale,
            "ignore_index": ignore_index,
        }

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


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
    ) -> None:
        super().__init__(temperature=temperature, softcap=softcap, logit_scale=logit_scale, ignore_index=ignore_index)
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
