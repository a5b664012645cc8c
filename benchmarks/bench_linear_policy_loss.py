"""`linear_policy_loss`, all gradients, from hidden states: time and memory, beside bare products and TRL's eager loss.

"matmul" is hidden · weightᵀ three times over, what loss and gradients need; "matmul, real" has the products of the
gradients themselves; "eager" makes float32 logits and derives TRL's loss by autograd.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dlogp_kernels import backends, linear_policy_loss

from . import policy, problem
from .case import Case, budget, case_of, timed
from .harness import Candidate, relative_error, verify
from .memory import MIB, in_process_of, peak_over
from .records import Record, record
from .shapes import MAIN, MAIN_N, Shape, Workload, require_fit, require_products

OP = "linear_policy_loss"
#: Responses of the batch; N tokens in all.
SEQUENCES = 8
LEAVES = ("hidden", "weight")

#: Relative. The eager loss rounds its logits to the dtype of the inputs; ours rounds gradients only.
TOLERANCES = {
    "ours": {"loss": 1e-4, "d_hidden": 0.02, "d_weight": 0.02},
    "eager": {"loss": 0.05, "d_hidden": 0.1, "d_weight": 0.1},
}
#: More than what logits in bfloat16 can change a log-probability by, mostly.
_MARGIN = 0.05
#: Tokens that are compared with float64.
_CHECKED = 64
_WARM_UP = Workload(OP, Shape("warm-up", 64, 4096), 32, training=True)


@dataclass(frozen=True)
class Step:
    """Inputs by the names of the function's arguments; hidden (B, T, D)."""

    inputs: Mapping[str, Tensor]

    def gradients(self, loss: object) -> tuple[Tensor, ...]:
        assert isinstance(loss, Tensor)
        return torch.autograd.grad(loss, [self.inputs[name] for name in LEAVES])

    def double(self, sequences: int) -> "Step":
        """The first responses in float64."""

        def exact(name: str, x: Tensor) -> Tensor:
            x = x.detach() if name == "weight" else x.detach()[:sequences]
            return (x.double() if x.is_floating_point() else x).requires_grad_(name in LEAVES)

        return Step({name: exact(name, x) for name, x in self.inputs.items()})


def plan(device: torch.device, mode: str) -> Iterator[Case]:
    for dtype in ("bfloat16",) if mode == "quick" else ("bfloat16", "float32"):
        work = Workload(OP, MAIN, MAIN_N, dtype, training=True)
        yield case_of("compare", _comparison, work, device, mode)
    if device.type == "cpu":
        for n in (MAIN_N, 2 * MAIN_N):
            yield case_of("workspace", _workspace, Workload(OP, MAIN, n, training=True))


def build(work: Workload, device: torch.device) -> Step:
    """Every token counts; old log-probabilities are near the policy's."""
    rows = problem.build(work, device)
    hidden, weight, target = (rows.inputs[name].detach() for name in (*LEAVES, "target"))
    with torch.no_grad():
        logits = [(x @ weight.t()).float() for x in hidden.split(_CHECKED)]
    logp = torch.cat([x.log_softmax(-1) for x in logits]).gather(-1, target[:, None])
    shape = (SEQUENCES, work.n // SEQUENCES)
    generator = torch.Generator(device).manual_seed(1)
    log_ratio = policy.off_the_edges(0.2 * torch.randn(shape, generator=generator, device=device), _MARGIN)
    inputs = {
        "hidden": hidden.reshape(*shape, -1).requires_grad_(),
        "weight": weight.requires_grad_(),
        "target": target.reshape(shape),
        "old_logp": logp.reshape(shape) - log_ratio,
        "advantage": torch.randn(SEQUENCES, generator=generator, device=device),
        "mask": torch.ones(shape, dtype=torch.bool, device=device),
    }
    return Step(inputs)


def ours(step: Step, reweight: str = "low_prob") -> Tensor:
    options: Any = {**step.inputs, "reweight": reweight}
    return linear_policy_loss(**options).loss


def eager(step: Step) -> Tensor:
    inputs = step.inputs
    logits = inputs["hidden"] @ inputs["weight"].t()
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logp = logits.log_softmax(-1).gather(-1, inputs["target"][..., None])[..., 0]
    batch = policy.Batch(logp, inputs["old_logp"], inputs["advantage"], inputs["mask"], logp)
    return policy.trl_loss(batch, policy.DAPO)


def bare_products(step: Step) -> list[Candidate]:
    hidden, weight = step.inputs["hidden"].detach().flatten(0, 1), step.inputs["weight"].detach()
    logits = torch.empty(hidden.shape[0], weight.shape[0], dtype=hidden.dtype, device=hidden.device)
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def product() -> None:
        torch.mm(hidden, weight.t(), out=logits)

    def two_more(_: object) -> None:
        product()
        product()

    def of_gradients(_: object) -> None:
        torch.mm(logits, weight, out=d_hidden)
        torch.mm(logits.t(), hidden, out=d_weight)

    return [Candidate("matmul", product, two_more), Candidate("matmul, real", product, of_gradients)]


def _comparison(kind: str, work: Workload, device: torch.device, mode: str) -> Iterator[Record]:
    require_fit(work, "eager", device)
    require_products(work, device)
    step = build(work, device)
    errors = {"ours": errors_of(partial(ours, reweight="none"), step), "eager": errors_of(eager, step)}
    for name, found in errors.items():
        verify(name, found, TOLERANCES[name])
    candidates = [Candidate("ours", partial(ours, step), step.gradients)]
    candidates += [Candidate("eager", partial(eager, step), step.gradients), *bare_products(step)]
    backend = backends.select(f"{OP}_fwd", device)
    yield from timed(kind, work, candidates, budget(mode), device, errors=errors, backend=backend)


def errors_of(function: Callable[[Step], Tensor], step: Step) -> dict[str, float]:
    """Relative, of the first responses, against eager in float64; without reweighting."""
    sequences = max(1, _CHECKED * SEQUENCES // step.inputs["mask"].numel())
    exact = step.double(sequences)
    few = Step({name: x if name == "weight" else x[:sequences] for name, x in step.inputs.items()})
    truth, found = eager(exact), function(few)
    errors = {"loss": abs(found.item() - truth.item()) / max(1.0, abs(truth.item()))}
    gradients = zip(LEAVES, few.gradients(found), exact.gradients(truth), strict=True)
    return errors | {f"d_{name}": relative_error(x, expected) for name, x, expected in gradients}


def _workspace(kind: str, work: Workload) -> Iterator[Record]:
    """Over inputs and gradients, in whichever form they are there.

    From forward on these are the float32 ones, which backward brings into the inputs' dtype: over both, as a step ends,
    forward's workspace would hide behind the latter.
    """
    found = in_process_of(__name__, str(work.n))
    waiting = 4 * work.shape.d * (work.shape.v + work.n)
    over = (max(found["forward"], found["whole"]) - waiting) / MIB
    logits = 4 * work.n * work.shape.v / MIB
    yield record(kind, work, "ours", "both", statistics={"MiB": over, "MiB of float32 logits": logits})


def answer(tokens: str) -> dict[str, int]:
    """Peak bytes over inputs and gradients, of forward alone and of a step, in this process, which should be fresh."""
    cpu = torch.device("cpu")
    small = build(_WARM_UP, cpu)
    small.gradients(ours(small))
    step = build(Workload(OP, MAIN, int(tokens), training=True), cpu)
    forward = peak_over(lambda: [ours(step)], cpu).peak
    return {"forward": forward, "whole": peak_over(lambda: step.gradients(ours(step)), cpu).peak}
