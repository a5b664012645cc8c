"""The only tolerances: error against float64 of the same inputs, in roundings of the type that computes.

A statistic may be off by STATISTIC_ROUNDINGS × ε32 × max(1, |value|) × max(1, m), m the row's largest Σ|h·w| + |b| or
|logit|, times logit_scale / temperature, plus log V: what rounding z − lse once, at its largest intermediate, does. An
element of a gradient may be off by GRADIENT_ROUNDINGS × (ε × s + ε32 × max(1, m) × S), ε that of its dtype; s is its
size and that of a random walk of the terms it sums, S the sum of their absolute values (cases.gradient_scales). For
float64 inputs ε64 stands for ε32. What underflows may become 0.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

STATISTIC_ROUNDINGS = 4.0
GRADIENT_ROUNDINGS = 2.0

#: The policy loss and its gradient by a token's logp: of ε32 (ε64 for float64 inputs) times the absolute terms that
#: it sums, each times 1 + |log ratio| (policy_cases.sizes), besides one rounding of the gradient's own dtype; of ε32
#: times max(1, |value|) a metric.
POLICY_ROUNDINGS = 4.0

#: Identical models: KL is this many ε32 at most, times the largest |z|.
ZERO_KL_ROUNDINGS = 8.0

#: Norm of the error of a gradient over its norm, where that of the logits was rounded to the inputs' dtype.
ROUNDED_GRADIENT_ERROR = {torch.bfloat16: 5e-3, torch.float16: 1e-3}

#: MiB over inputs, outputs and gradients, per backend: forward, backward.
MEMORY_MIB = {"cpu": (64, 256), "reference": (256, 256), "triton": (64, 512), "gemm": (64, 512), "cuda": (64, 512)}

#: Of log p, relative to it, however near to 0 it is: down to −1e-20 and beyond. And of a gradient −p of an unlikely
#: token, in whose log p its distance to the likeliest one is rounded, at most 88.
CERTAINTY_ERROR = {torch.float32: 1e-5, torch.float64: 1e-13}
NEAR_CERTAINTY_GRADIENT_ERROR = {torch.float32: 2e-5, torch.float64: 1e-13}

#: Absolute error of log p at a hidden size of 4096 and |z| ≤ 50, where sums are rounded: in float32, and on the CPU.
LOGP_ERROR = 5e-6
#: The tensor cores of a GPU truncate float32 sums of bfloat16 and float16 products. A statistic of such inputs may be
#: off by so many roundings instead of STATISTIC_ROUNDINGS; over many rows, by so many times what cuBLAS with float32
#: output is off (median and 99.9 % of rows), and by no more than so much. The roundings are by arithmetic: an H100 had
#: log p off by up to 9.2e-5 at a hidden size of 4096, of a Δlog p near 0 up to twice that, which is 10 of them.
TENSOR_CORE_ROUNDINGS = 16.0
TIMES_CUBLAS = 2.0
TENSOR_CORE_ERROR = 1e-3

#: Of a compiled kernel: registers a thread, and bytes a thread that did not fit into them, where that is not 0, by
#: version of Triton, GPU and kernel.
REGISTERS = {"cuda": 255, "hip": 512}
SPILLED_BYTES: dict[tuple[str, str, str], int] = {
    # The tiles are those that an H100 was fastest with under Triton 3.6, which keeps all in registers.
    ("3.7", "sm_90", "_linear_delta_logp_fwd_kernel"): 8,
    ("3.7", "sm_90", "_linear_extrapolated_sample_kernel"): 24,
    # A loop over the targets in the loop over tiles; with every option at once, which nobody has timed.
    ("3.6", "sm_90", "_linear_logp_fwd_kernel of several targets"): 24,
    ("3.6", "sm_90", "_linear_delta_logp_fwd_kernel of several targets"): 304,
    ("3.7", "sm_90", "_linear_logp_fwd_kernel of several targets"): 8,
    ("3.7", "sm_90", "_linear_delta_logp_fwd_kernel of several targets"): 200,
    # From 3.8 on a thread adds its part of a row as a tree, of which more is live than of one sum; no GPU has timed it.
    ("3.8", "sm_80", "_linear_logp_fwd_kernel"): 32,
    ("3.8", "sm_80", "_linear_extrapolated_sample_kernel"): 48,
    ("3.8", "sm_89", "_linear_logp_fwd_kernel"): 8,
    ("3.8", "sm_89", "_linear_delta_logp_fwd_kernel"): 16,
    ("3.8", "sm_89", "_linear_extrapolated_sample_kernel"): 40,
    ("3.8", "sm_90", "_linear_logp_fwd_kernel"): 56,
    ("3.8", "sm_90", "_linear_delta_logp_fwd_kernel"): 216,
    ("3.8", "sm_90", "_extrapolated_sample_kernel"): 8,
    ("3.8", "sm_100", "_linear_logp_fwd_kernel"): 16,
    ("3.8", "sm_100", "_linear_delta_logp_fwd_kernel"): 488,
}

#: Of a thread of a CUDA C++ kernel: registers, so that two blocks share a multiprocessor, and bytes of the stack, by
#: architecture: 16 for the words of a Philox block, the rest for what does not fit into the registers.
CUDA_REGISTERS = 64
CUDA_STACK_BYTES = {"sm_80": 64, "sm_90a": 32, "sm_100a": 32}

#: Through tiny float32 models of transformers: statistics off float64 of the models' own float32 logits; hidden states
#: rounded in another order and gradients, relative to the largest of a tensor.
HF_STATISTIC_ERROR = 5e-6
HF_HIDDEN_ERROR = 2e-5
HF_GRADIENT_ERROR = 1e-4


class Accuracy(NamedTuple):
    """Asserts that errors are within tolerance, after reporting them to `report(op, quantity, dtype, error, limit)`.

    In roundings, but those `beside_cublas`, which are absolute.
    """

    report: Callable[[str, str, str, float, float], None]
    #: Where the ops run.
    device: str = "cpu"

    def statistics(self, op: str, actual: tuple, truth: tuple, magnitude: Tensor, dtype: torch.dtype) -> None:
        """`actual` and `truth` are NamedTuples; `magnitude` (…) is m of each row, `dtype` that of the inputs."""
        assert actual._fields == truth._fields
        for name, value, expected in zip(actual._fields, actual, truth, strict=True):
            if not value.is_floating_point():  # a token
                continue
            rounding = torch.finfo(value.dtype).eps * magnitude.clamp_min(1.0)
            if expected.dim() > rounding.dim():
                rounding = rounding[..., None]
            error = _roundings(value, expected, rounding * expected.abs().clamp_min(1.0))
            self._check(op, name, dtype, error, self._statistic_roundings(op, dtype))

    def beside_cublas(self, quantity: str, error: Tensor, of_cublas: Tensor, dtype: torch.dtype) -> None:
        """Errors of many rows, of the kernel and of log-softmax in float64 of cuBLAS's float32 product."""
        name = str(dtype).removeprefix("torch.")
        for quantile in (0.5, 0.999):
            own, other = (x.abs().double().quantile(quantile).item() for x in (error, of_cublas))
            self.report(quantity, f"{100 * quantile:g} %", name, own, TIMES_CUBLAS * other)
            assert own <= TIMES_CUBLAS * other, f"{quantity}: {own:.2g} at {quantile:g}, cuBLAS {other:.2g}"
        largest = error.abs().max().item()
        self.report(quantity, "largest", name, largest, TENSOR_CORE_ERROR)
        assert largest <= TENSOR_CORE_ERROR, f"{quantity}: the largest error is {largest:.2g}"

    def _statistic_roundings(self, op: str, dtype: torch.dtype) -> float:
        on_tensor_cores = self.device == "cuda" and "linear" in op and dtype in (torch.bfloat16, torch.float16)
        return TENSOR_CORE_ROUNDINGS if on_tensor_cores else STATISTIC_ROUNDINGS

    def gradients(
        self,
        op: str,
        actual: dict[str, Tensor],
        truth: dict[str, Tensor],
        scales: dict[str, tuple[Tensor, Tensor]],
        magnitude: Tensor,
        dtype: torch.dtype,
    ) -> None:
        """All by input name; `scales` are (s, S), `dtype` is the widest of the inputs', which computes."""
        assert actual.keys() == truth.keys()
        compute = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
        largest = max(1.0, magnitude.max().item()) if magnitude.numel() else 1.0
        for name, value in actual.items():
            walk, absolute = scales[name]
            rounding = torch.finfo(value.dtype).eps * (truth[name].abs() + walk) + compute.eps * largest * absolute
            rounding += compute.tiny * value.numel() + torch.finfo(value.dtype).tiny * torch.finfo(value.dtype).eps
            error = _roundings(value, truth[name], rounding)
            self._check(op, f"d_{name}", value.dtype, error, GRADIENT_ROUNDINGS)

    def policy(self, op: str, actual: Any, expected: Any, sizes: Any, width: int) -> None:
        """`actual` and `expected` have loss, metrics, gradients; `width` is in bytes that of the widest input."""
        dtype = torch.float64 if width == 8 else torch.float32
        rounding = torch.finfo(dtype).eps
        assert actual.loss.dtype == dtype
        tiny = torch.finfo(dtype).tiny
        error = _roundings(actual.loss, expected.loss, rounding * sizes.loss + tiny)
        self._check(op, "loss", dtype, error, POLICY_ROUNDINGS)
        error = _roundings(actual.metrics, expected.metrics, rounding * expected.metrics.abs().clamp_min(1.0))
        self._check(op, "metrics", dtype, error, POLICY_ROUNDINGS)
        limits = {"logp": sizes.grad_logp, "entropy": torch.zeros(()), "kl": torch.zeros(())}
        for name, grad in actual.gradients.items():
            own = torch.finfo(grad.dtype)
            limit = rounding * limits[name] + (own.eps + rounding) * expected.gradients[name].abs() + own.tiny
            error = _roundings(grad, expected.gradients[name], limit)
            self._check(op, f"d_{name}", grad.dtype, error, POLICY_ROUNDINGS)

    def linear_policy(
        self,
        actual: Any,
        expected: Any,
        sizes: Any,
        scales: dict[str, tuple[Tensor, Tensor]],
        magnitude: Tensor,
        dtype: torch.dtype,
    ) -> None:
        """Of `linear_policy_loss`: loss and metrics as of `policy`, gradients as of `gradients`."""
        op, compute = "linear_policy_loss", torch.float64 if dtype == torch.float64 else torch.float32
        rounding = torch.finfo(compute).eps
        assert actual.loss.dtype == compute
        largest = max(1.0, magnitude.max().item()) if magnitude.numel() else 1.0
        self._check(op, "loss", dtype, _roundings(actual.loss, expected.loss, rounding * sizes.loss), POLICY_ROUNDINGS)
        limit = rounding * largest * expected.metrics.abs().clamp_min(1.0)
        self._check(op, "metrics", dtype, _roundings(actual.metrics, expected.metrics, limit), POLICY_ROUNDINGS)
        self.gradients(op, actual.gradients, expected.gradients, scales, magnitude, dtype)

    def _check(self, op: str, quantity: str, dtype: torch.dtype, error: float, limit: float) -> None:
        name = str(dtype).removeprefix("torch.")
        self.report(op, quantity, name, error, limit)
        assert error <= limit, f"{op} {quantity} {name}: {error:.3g} roundings from float64, limit {limit:g}"


def _roundings(actual: Tensor, truth: Tensor, rounding: Tensor) -> float:
    """Largest |actual − truth| / rounding; infinite where a NaN or an infinity is not where the truth has it."""
    actual = actual.detach().to(torch.float64)
    assert actual.shape == truth.shape
    finite = truth.isfinite()
    if not torch.equal(actual[~finite].nan_to_num(nan=0.125), truth[~finite].nan_to_num(nan=0.125)):
        return torch.inf
    error = ((actual - truth).abs() / rounding.expand_as(truth))[finite & (actual != truth)]
    return error.nan_to_num(nan=torch.inf).max().item() if error.numel() else 0.0
