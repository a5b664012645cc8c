"""`policy_loss`, forward and backward, of given log-probabilities: time and peak memory.

    python -m benchmarks.bench_policy_loss

Compared with TRL's GRPOTrainer._compute_loss, eager, line by line: the loss alone, and with the clip fractions that it
logs. It has no reweighting, which `ours` includes; `ours` always has its metrics.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dlogp_kernels import backends, policy_loss

from .harness import Budget, Candidate, Clock, Timings, WrongResultError, measure, relative_error
from .memory import peak_over

#: Times as fast as TRL's loss alone, and tensors of B · T at most.
_FASTER, _TENSORS = 4, 2
_ROOT = Path(__file__).resolve().parent.parent


class Batch(NamedTuple):
    """logp (B, T) is a leaf that requires a gradient."""

    logp: Tensor
    old_logp: Tensor
    advantage: Tensor
    mask: Tensor
    ref_logp: Tensor


def build(sequences: int, tokens: int, device: torch.device) -> Batch:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    old_logp = normal(sequences, tokens).abs_().neg_()
    logp = (old_logp + 0.2 * normal(sequences, tokens)).requires_grad_()
    lengths = torch.randint(tokens // 4, tokens + 1, (sequences, 1), generator=generator, device=device)
    mask = torch.arange(tokens, device=device) < lengths
    return Batch(logp, old_logp, normal(sequences), mask, logp.detach() + 0.2 * normal(sequences, tokens))


class Case(NamedTuple):
    """What is computed; the same options by our names and by TRL's."""

    label: str
    loss_type: str = "dapo"
    importance: str = "token"
    kl_beta: float = 0.0


CASES = (
    Case("DAPO"),
    Case("DAPO, KL to a reference", kl_beta=0.04),
    Case("GRPO", loss_type="grpo"),
    Case("GSPO", loss_type="grpo", importance="sequence"),
    Case("CISPO", loss_type="cispo"),
    Case("SAPO", loss_type="sapo"),
)


def ours(batch: Batch, case: Case, reweight: str = "low_prob") -> Tensor:
    ref_logp = batch.ref_logp if case.kl_beta else None
    return policy_loss(
        *batch[:4], loss_type=case.loss_type, importance=case.importance, reweight=reweight, ref_logp=ref_logp,
        kl_beta=case.kl_beta,
    ).loss  # fmt: skip


def trl(batch: Batch, case: Case, with_metrics: bool = False) -> Tensor:
    logp, old_logp, advantage, mask, ref_logp = batch
    advantages, mask = advantage.unsqueeze(1), mask.to(torch.int64)
    log_ratio = logp - old_logp
    if case.importance == "sequence":
        log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).unsqueeze(-1)
    coef_1 = torch.exp(log_ratio)
    if case.loss_type == "cispo":
        per_token_loss = -torch.clamp(coef_1, max=0.28).detach() * advantages * logp
    elif case.loss_type == "sapo":
        temperatures = torch.where(advantages > 0, 1.0, 1.05)
        per_token_loss = -torch.sigmoid(temperatures * (coef_1 - 1)) * 4 / temperatures * advantages
    else:
        coef_2 = torch.clamp(coef_1, 1 - 0.2, 1 + 0.28)
        per_token_loss = -torch.min(coef_1 * advantages, coef_2 * advantages)
    if case.kl_beta:
        per_token_loss = per_token_loss + case.kl_beta * (torch.exp(ref_logp - logp) - (ref_logp - logp) - 1)
    if case.loss_type in ("grpo", "sapo"):
        loss = ((per_token_loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
    else:
        loss = (per_token_loss * mask).sum() / mask.sum()
    if with_metrics:
        low, high = (coef_1 < 1 - 0.2) & (advantages < 0), (coef_1 > 1 + 0.28) & (advantages > 0)
        for clipped in (low, high, low | high):
            (clipped.float() * mask).sum() / mask.sum()
            (clipped.float() * mask).sum(-1) / mask.sum(-1)
    return loss


def candidates(batch: Batch, case: Case) -> list[Candidate]:
    def backward(loss: object) -> Tensor:
        assert isinstance(loss, Tensor)
        return torch.autograd.grad(loss, batch.logp)[0]

    return [
        Candidate("ours", partial(ours, batch, case), backward),
        Candidate("TRL", partial(trl, batch, case), backward),
        Candidate("TRL with metrics", partial(trl, batch, case, with_metrics=True), backward),
    ]


def verify(batch: Batch, case: Case) -> None:
    """Loss and gradient of both against TRL's in float64, without reweighting."""
    exact = Batch(*(x.detach().double() if x.is_floating_point() else x for x in batch))
    exact.logp.requires_grad_()
    truth = trl(exact, case)
    gradient = torch.autograd.grad(truth, exact.logp)[0]
    functions: tuple[tuple[str, Callable[[], Tensor]], ...] = (
        ("ours", partial(ours, batch, case, reweight="none")),
        ("TRL", partial(trl, batch, case)),
    )
    for name, function in functions:
        loss = function()
        errors = (
            abs(loss.item() - truth.item()) / max(1.0, abs(truth.item())),
            relative_error(torch.autograd.grad(loss, batch.logp)[0], gradient),
        )
        if not max(errors) <= 1e-5:
            raise WrongResultError(f"{name}, {case.label}: loss and gradient are off by {errors}")


def tensors_at_the_peak(sequences: int, tokens: int, name: str) -> float:
    """Peak memory of forward and backward, in tensors of B · T float32; the gradient counts."""
    functions: dict[str, Callable[[Batch, Case], Tensor]] = {"ours": ours, "TRL": trl}
    function = functions[name]

    def step(batch: Batch) -> list[Tensor]:
        torch.autograd.grad(function(batch, CASES[0]), batch.logp)
        return []

    step(build(2, 64, torch.device("cpu")))
    batch = build(sequences, tokens, torch.device("cpu"))
    return peak_over(lambda: step(batch), torch.device("cpu")).peak / (4 * sequences * tokens)


def in_fresh_process(sequences: int, tokens: int, name: str) -> float:
    command = [sys.executable, "-m", "benchmarks.bench_policy_loss", "--peak", json.dumps([sequences, tokens, name])]
    child = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=True)
    return float(child.stdout)


def line(case: Case, timings: Timings) -> str:
    milliseconds = [1e3 * timings.quantiles(name, "both").median for name in ("ours", "TRL")]
    faster = [timings.ratio(name, "ours", "both").median for name in ("TRL", "TRL with metrics")]
    cells = [f"{milliseconds[0]:.2f} ms", f"{milliseconds[1]:.2f} ms", f"{faster[0]:.1f} ×", f"{faster[1]:.1f} ×"]
    return f"| {case.label} | {' | '.join(cells)} | ≥ {_FASTER} × | {'yes' if faster[0] >= _FASTER else 'no'} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_policy_loss", description=__doc__)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each loss")
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--peak", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(tensors_at_the_peak(*options.peak))
        return
    batch = build(options.sequences, options.tokens, options.device)
    print(
        f"{options.sequences} × {options.tokens} tokens, float32, forward and backward, {torch.get_num_threads()} "
        f"threads, torch {torch.__version__}, backend `{backends.select('policy_loss_fwd', options.device)}`\n"
    )
    print("| loss | ours | TRL, eager | ours is faster | with metrics | reach | met? |\n|---|---|---|---|---|---|---|")
    for case in CASES:
        verify(batch, case)
        timings = measure(candidates(batch, case), Budget(seconds=options.seconds), Clock(options.device))
        print(line(case, timings), flush=True)
    if options.device.type == "cpu":
        # Tensors so large that the process' own memory does not matter.
        peaks = [in_fresh_process(options.sequences, 16 * options.tokens, name) for name in ("ours", "TRL")]
        met = "yes" if peaks[0] <= _TENSORS + 0.05 else "no"
        print(
            "\nPeak memory of forward and backward, gradient included, in tensors of B · T float32: ours "
            f"{peaks[0]:.2f} (reach ≤ {_TENSORS}: {met}), TRL {peaks[1]:.2f}; T = {16 * options.tokens}."
        )


if __name__ == "__main__":
    main()
