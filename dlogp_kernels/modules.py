"""nn.Module forms of the functions: they hold the options and have no parameters."""

import inspect
from collections.abc import Callable
from typing import Any, ClassVar, get_args

from torch import Tensor, nn

from . import functional


class _Form(nn.Module):
    """Of a function: its parameters that may be a tensor are inputs of `forward`, all others are options to hold.

    Inputs are given by name, or by place in the order of the function's parameters; options by name, with the
    function's defaults.
    """

    _function: ClassVar[Callable[..., Any]]
    _inputs: ClassVar[list[str]]
    #: Of the constructor; what `help` shows.
    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(cls, function: Callable[..., Any]) -> None:
        super().__init_subclass__()
        parameters = inspect.signature(function).parameters.values()
        cls._function = staticmethod(function)
        cls._inputs = [parameter.name for parameter in parameters if _may_be_tensor(parameter)]
        cls.__signature__ = inspect.Signature([p for p in parameters if not _may_be_tensor(p)])

    def __init__(self, **options: Any) -> None:
        super().__init__()
        try:
            held = self.__signature__.bind(**options)
        except TypeError as error:
            raise TypeError(f"{type(self).__name__}: {error}") from None
        held.apply_defaults()
        self.options = held.arguments

    def forward(self, *inputs: Any, **named: Any) -> Any:
        if len(inputs) > len(self._inputs):
            expected = f"at most {len(self._inputs)}: {', '.join(self._inputs)}"
            raise TypeError(f"{type(self).__name__} is given {len(inputs)} inputs by place, expected {expected}")
        by_place = dict(zip(self._inputs, inputs, strict=False))
        return self._function(**by_place, **named, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


def _may_be_tensor(parameter: inspect.Parameter) -> bool:
    return Tensor in (parameter.annotation, *get_args(parameter.annotation))


class LinearLogp(_Form, function=functional.linear_logp):
    """Module form of `dlogp_kernels.linear_logp`."""


class LinearDeltaLogp(_Form, function=functional.linear_delta_logp):
    """Module form of `dlogp_kernels.linear_delta_logp`."""


class Logp(_Form, function=functional.logp):
    """Module form of `dlogp_kernels.logp`."""


class DeltaLogp(_Form, function=functional.delta_logp):
    """Module form of `dlogp_kernels.delta_logp`."""


class PolicyLossModule(_Form, function=functional.policy_loss):
    """Module form of `dlogp_kernels.policy_loss`."""


class LinearPolicyLoss(_Form, function=functional.linear_policy_loss):
    """Module form of `dlogp_kernels.linear_policy_loss`."""
