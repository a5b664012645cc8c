"""`policy_loss`, forward and backward, of given log-probabilities: time and peak memory, beside TRL's eager loss.

"TRL" is the loss alone, "TRL with metrics" has the clip fractions that it logs; `ours` reweights and always has its
metrics.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from dlogp_kernels import backends, policy_loss

from .case import Case, budget, case_of, timed
from .harness import Candidate, relative_error, verify
from .memory import in_process_of, peak_over
from .policy import DAPO, Batch, Loss, build, trl_loss
from .records import Record, record
from .shapes import Shape, Workload

OP = "policy_loss"
#: The batch of the acceptance table.
SEQUENCES, TOKENS = 64, 4096
SHAPE = Shape(f"B={SEQUENCES} T={TOKENS}", 0, 0)
LOSSES = (
    DAPO,
    Loss("DAPO, KL to a reference", kl_beta=0.04),
    Loss("GRPO", loss_type="grpo"),
    Loss("GSPO", loss_type="grpo", importance="sequence"),
    Loss("CISPO", loss_type="cispo"),
    Loss("SAPO", loss_type="sapo"),
)

TOLERANCES = {"loss": 1e-5, "d_logp": 1e-5}
#: Memory is measured of so many times the tokens: the process' own does not matter then.
_LARGER = 16


def plan(device: torch.device, mode: str) -> Iterator[Case]:
    for loss in LOSSES[:1] if mode == "quick" else LOSSES:
        work = Workload(OP, SHAPE, SEQUENCES * TOKENS, "float32", training=True, variant=loss.label)
        yield case_of("compare", _comparison, work, loss, device, mode)
    if device.type == "cpu":
        work = Workload(OP, SHAPE, _LARGER * SEQUENCES * TOKENS, "float32", training=True, variant=DAPO.label)
        for name in ("ours",) if mode == "quick" else ("ours", "TRL"):
            yield case_of("memory", _memory, work, name)


def ours(batch: Batch, loss: Loss, reweight: str = "low_prob") -> Tensor:
    return policy_loss(
        *batch[:4], loss_type=loss.loss_type, importance=loss.importance, reweight=reweight, kl_beta=loss.kl_beta,
        ref_logp=batch.ref_logp if loss.kl_beta else None,
    ).loss  # fmt: skip


_CANDIDATES: Mapping[str, Callable[[Batch, Loss], Tensor]] = {
    "ours": ours,
    "TRL": trl_loss,
    "TRL with metrics": partial(trl_loss, with_metrics=True),
}


def _comparison(kind: str, work: Workload, loss: Loss, device: torch.device, mode: str) -> Iterator[Record]:
    batch = build(SEQUENCES, TOKENS, device)
    errors = {"ours": errors_of(partial(ours, reweight="none"), batch, loss), "TRL": errors_of(trl_loss, batch, loss)}
    for name, found in errors.items():
        verify(name, found, TOLERANCES)
    candidates = [
        Candidate(name, partial(function, batch, loss), partial(_gradient, batch))
        for name, function in _CANDIDATES.items()
    ]
    backend = backends.select(f"{OP}_fwd", device)
    yield from timed(kind, work, candidates, budget(mode), device, errors=errors, backend=backend)


def _gradient(batch: Batch, loss: object) -> Tensor:
    assert isinstance(loss, Tensor)
    return torch.autograd.grad(loss, batch.logp)[0]


def errors_of(function: Callable[[Batch, Loss], Tensor], batch: Batch, loss: Loss) -> dict[str, float]:
    """Relative, against TRL's in float64; without reweighting."""
    exact = batch.double()
    exact.logp.requires_grad_()
    truth, found = trl_loss(exact, loss), function(batch, loss)
    gradient = _gradient(exact, truth)
    return {
        "loss": abs(found.item() - truth.item()) / max(1.0, abs(truth.item())),
        "d_logp": relative_error(_gradient(batch, found), gradient),
    }


def _memory(kind: str, work: Workload, name: str) -> Iterator[Record]:
    """In tensors of B · T float32; the gradient counts."""
    peak = in_process_of(__name__, name)["peak"]
    yield record(kind, work, name, "both", statistics={"tensors": peak / (4 * work.n)})


def answer(name: str) -> dict[str, int]:
    """Peak bytes of forward and backward, in this process, which should be fresh."""
    cpu = torch.device("cpu")
    alive: list[object] = []

    def step(batch: Batch) -> list[Tensor]:
        """Ours keeps what backward read: that and the gradient are its peak.

        Linux counts pages in batches of each core, exactly only when asked, and a peak that is over by then may lack
        some of them.
        """
        loss = _CANDIDATES[name](batch, DAPO)
        alive.append((loss, torch.autograd.grad(loss, batch.logp, retain_graph=name == "ours")))
        return []

    step(build(2, 64, cpu))
    batch = build(SEQUENCES, _LARGER * TOKENS, cpu)
    return {"peak": peak_over(lambda: step(batch), cpu).peak}
