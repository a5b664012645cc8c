"""Inputs, definition and comparison for the tests of the sampling ops. Inputs and results are on the CPU."""

import math
from typing import Any, NamedTuple

import cases
import torch
from torch import Tensor

import dlogp_kernels
from dlogp_kernels import Sample
from dlogp_kernels.reference import sampling as reference_sample
from dlogp_kernels.reference.sampling import DRAFT, REPLACEMENT

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
THRESHOLDS = {
    "delta_logp": -0.3, "kl": 0.2, "reverse_kl": 0.2, "avg_kl": 0.2, "entropy": 2.0, "rl_entropy": 2.0, "random": 0.5,
}  # fmt: skip
FILTERS = {
    "none": {},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.1},
    "all three": {"top_k": 40, "top_p": 0.9, "min_p": 0.02},
    "hardly any": {"top_k": 250, "top_p": 0.9999, "min_p": 1e-6},
}
NO_OPTIONS: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0}
_LARGEST_SCORE_NOISE = 23.0


def criterion_options(criterion: str) -> dict[str, Any]:
    return {"criterion": criterion} | ({"threshold": THRESHOLDS[criterion]} if criterion in THRESHOLDS else {})


def with_defaults(options: dict[str, Any], rows: int) -> dict[str, Any]:
    defaults = {"gamma": 0.0, "criterion": "all", "threshold": None, "draft": "base", "seed": 1, "step": 0}
    return defaults | NO_OPTIONS | {"row_id": torch.arange(rows)} | options


def definition(logits: Tensor, base_logits: Tensor, **options: Any) -> Sample:
    """The definition in float64, of (B, V)."""
    chosen = with_defaults(options, logits.shape[0])
    seed = chosen["seed"] - 2**64 if chosen["seed"] >= 2**63 else chosen["seed"]
    chosen |= {"seed": torch.tensor([seed]), "step": torch.tensor([chosen["step"]])}
    return reference_sample.extrapolated_sample(logits.double(), base_logits.double(), **chosen)


class Values(NamedTuple):
    """What `extrapolated_sample` returns besides tokens."""

    delta_logp: Tensor
    logp: Tensor
    base_logp: Tensor


def check_sample(
    accuracy: Any | None,
    op: str,
    actual: Sample,
    logits: Tensor,
    base_logits: Tensor,
    magnitude: Tensor,
    dtype: torch.dtype,
    computed_by: Tensor | None = None,
    **options: Any,
) -> None:
    """Token for token what the definition draws, but for ties within rounding, each of which is shown to be one.

    `magnitude` (B,) is m of tolerances.py, `dtype` that of the inputs. Logits that were computed are off by roundings
    of `computed_by` (B,), the largest intermediate of a row. Without `accuracy` the other outputs are not looked at.
    """
    expected = definition(logits, base_logits, **options)
    chosen = with_defaults(options, logits.shape[0])
    z, base_z = logits.double(), base_logits.double()
    eps = torch.finfo(actual.logp.dtype).eps
    sizes = torch.zeros_like(magnitude) if computed_by is None else computed_by
    drafted = base_z if chosen["draft"] == "base" else z
    for row in (actual.draft_token != expected.draft_token).nonzero().flatten().tolist():
        assert_tie(drafted[row], actual.draft_token[row], DRAFT, row, chosen, eps, sizes[row].item())
    for row in (actual.selected != expected.selected).nonzero().flatten().tolist():
        assert_selected_as_drafted(z[row], base_z[row], row, actual, expected, chosen, eps, sizes[row].item())
    replacing = reference_sample.extrapolated_logits(z, base_z, chosen["gamma"])
    kept = torch.where(actual.selected, expected.token, actual.draft_token)
    compared = actual.selected == expected.selected
    for row in ((actual.token != kept) & compared).nonzero().flatten().tolist():
        assert actual.selected[row], "a draft that was not replaced is the token"
        size = (1 + 2 * chosen["gamma"]) * sizes[row].item()
        assert_tie(replacing[row], actual.token[row], REPLACEMENT, row, chosen, eps, size)
    good = actual.token >= 0
    assert torch.equal(good, expected.token >= 0)
    if good.any() and accuracy is not None:
        truth = Values(
            logp_of(z, actual.draft_token) - logp_of(base_z, actual.draft_token),
            logp_of(z, actual.token),
            logp_of(base_z, actual.token),
        )
        measured = Values(*(x[good] for x in actual[3:]))
        accuracy.statistics(op, measured, Values(*(x[good] for x in truth)), magnitude[good], dtype)


def logp_of(z: Tensor, token: Tensor) -> Tensor:
    return z.log_softmax(-1).gather(-1, token.clamp_min(0)[:, None])[:, 0]


def assert_tie(
    z: Tensor, token: Tensor, stream: int, row: int, chosen: dict[str, Any], eps: float, size: float
) -> None:
    """`token` of z (V,) is kept, and no other that is kept scores more, both up to rounding of z or of `size`."""
    temperature = chosen["temperature"]
    finite = max(z[z > -torch.inf].abs().max().item(), size)
    if temperature == 0.0:
        assert z[token] >= z.max() - 4 * eps * finite
        return
    scaled = z[None] / temperature
    rounding = 4 * eps * (finite / temperature + _LARGEST_SCORE_NOISE)
    loose, strict = (kept_up_to(scaled, chosen, sign * 16 * eps)[0] for sign in (1, -1))
    assert loose[token], f"row {row}: token {token} should have been cut off"
    seed, step = (torch.tensor([chosen[name]]) for name in ("seed", "step"))
    tokens = torch.arange(z.shape[0])
    bits = reference_sample.noise_bits(tokens, chosen["row_id"][row : row + 1], seed, step, stream)
    score = (scaled + reference_sample.gumbel(bits, FP64))[0]
    gap = score.masked_fill(~strict, -torch.inf).max() - score[token]
    assert gap <= rounding, f"row {row}: a token scores {gap:.3g} more than {token}, rounding explains {rounding:.3g}"


def kept_up_to(scaled: Tensor, chosen: dict[str, Any], slack: float) -> Tensor:
    """What the filters keep if they are moved by a relative `slack`."""
    top_k, top_p, min_p = chosen["top_k"], chosen["top_p"], chosen["min_p"]
    low = scaled[0, scaled[0] > -torch.inf].abs().max() * slack
    blurred = scaled
    if 0 < top_k < scaled.shape[-1]:
        kth = scaled.topk(top_k, dim=-1).values[..., -1:]
        blurred = scaled.masked_fill(scaled < kth - low, -torch.inf)
        top_k = 0
    top_p = top_p if top_p == 1.0 else min(1.0, max(0.0, top_p + slack * scaled.shape[-1]))
    return reference_sample.kept_tokens(blurred, top_k, top_p, max(0.0, min_p * (1.0 - slack)))


def assert_selected_as_drafted(
    z: Tensor,
    base_z: Tensor,
    row: int,
    actual: Sample,
    expected: Sample,
    chosen: dict[str, Any],
    eps: float,
    size: float,
) -> None:
    """The other selection is that of the other one of two drafts that tie, or the value lies at the threshold."""
    draft, criterion, threshold = actual.draft_token[row], chosen["criterion"], chosen["threshold"]
    value = criterion_value(z[None], base_z[None], draft[None], criterion)[0]
    if criterion == "delta_logp" and draft != expected.draft_token[row] and actual.selected[row] == (value < threshold):
        return
    scale = z[z > -torch.inf].abs().max() + base_z[base_z > -torch.inf].abs().max() + math.log(z.shape[0])
    rounding = 8 * eps * max(1.0, float(scale), size)
    assert abs(value - threshold) <= rounding, f"row {row}: {criterion} of {draft} is {value:.6g}, not near {threshold}"


def criterion_value(z: Tensor, base_z: Tensor, draft: Tensor, criterion: str) -> Tensor:
    """What is compared with the threshold, from float64 logits (B, V), written as method.md has it."""
    log_p, log_q = z.log_softmax(-1), base_z.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()

    def expectation(weights: Tensor, values: Tensor) -> Tensor:
        return (weights * values.masked_fill(weights == 0, 0.0)).sum(-1)

    kl, reverse_kl = expectation(p, log_p - log_q), expectation(q, log_q - log_p)
    return {
        "delta_logp": (log_p - log_q).gather(-1, draft[:, None])[:, 0],
        "kl": kl,
        "reverse_kl": reverse_kl,
        "avg_kl": (kl + reverse_kl) / 2,
        "entropy": -expectation(q, log_q),
        "rl_entropy": -expectation(p, log_p),
    }[criterion]


def is_definition(backend: str) -> bool:
    """Plain PyTorch on the CPU: slow, and nearly what it is compared with."""
    return backend == "reference" and cases.DEVICE.type == "cpu"


def random_pair(rows: int, v: int, dtype: torch.dtype = FP64, spread: float = 3.0, seed: int = 0) -> tuple[Tensor, ...]:
    """Logits of two models that are near one another."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, v, generator=generator, dtype=FP64) * spread
    base_z = z + torch.randn(rows, v, generator=generator, dtype=FP64)
    return z.to(dtype), base_z.to(dtype)


def check_part_of_a_vocabulary(v: int, first: int, end: int) -> None:
    """A part that says where it begins is drawn from as the whole one is where all other tokens are masked.

    The criterion `random` has the noise of the row, which does not move with the tokens.
    """
    pair = [x.to(cases.DEVICE) for x in random_pair(8, v, FP32)]
    outside = torch.ones(v, dtype=torch.bool, device=cases.DEVICE)
    outside[first:end] = False
    parts, masked = [x[:, first:end] for x in pair], [x.masked_fill(outside, -torch.inf) for x in pair]
    options = (0.3, "random", 0.5, "base", 0.7, 0, 1.0, 0.0)
    drawn, whole = (
        Sample(*torch.ops.dlogp.extrapolated_sample(*logits, None, 5, 2, None, None, begin, *options))
        for logits, begin in ((parts, first), (masked, 0))
    )
    assert drawn.selected.any() and not drawn.selected.all()
    assert torch.equal(drawn.token + first, whole.token) and torch.equal(drawn.draft_token + first, whole.draft_token)
    assert torch.equal(drawn.selected, whole.selected)
    torch.testing.assert_close(drawn.logp, whole.logp)


def adversarial_pair(v: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A few rows of each kind that is known to go wrong somewhere."""
    z, base_z = random_pair(32, v)
    infinity = torch.inf
    z[2:4], base_z[2:4] = z[2:4].round(), base_z[2:4].round()  # ties
    z[4], base_z[4] = 1.0, -2.0  # nothing but ties
    z[5], base_z[6] = 0.5, 0.25
    z[7:9] += 1e4
    base_z[8:10] -= 1e4
    z[10, ::3] = base_z[10, ::3] = -infinity
    z[11, 1::2] = -infinity
    base_z[12, 1::2] = -infinity
    z[13, : v // 2] = -infinity  # whole tiles
    base_z[14, : v // 2] = -infinity
    z[15, v // 2 :] = base_z[15, v // 2 :] = -infinity
    z[16, torch.arange(v) != v - 1] = -infinity  # one token is possible
    base_z[17, torch.arange(v) != v // 2] = -infinity
    z[18, torch.arange(v) != 3] = base_z[18, torch.arange(v) != 3] = -infinity
    z[19, 7] += 60.0  # peaked
    base_z[20, 250] += 60.0
    z[21, 7] += 60.0
    base_z[21, 8] += 60.0
    z[22:24] *= 20.0
    base_z[24] *= 20.0
    z[25] = base_z[25]  # identical models
    z[26] = torch.linspace(30.0, -30.0, v, dtype=FP64)  # in order
    base_z[26] = z[26].flip(0)
    z[27, :] = 0.0
    z[27, 100:110] = 5.0  # the kept ones are equal
    base_z[28] = z[28].clamp_max(1.0)  # many equal largest
    z[29] *= 1e-6  # nearly uniform
    base_z[30] = -1e30  # least finite number, about
    base_z[30, 5] = 3.0
    return z.to(dtype), base_z.to(dtype)


def sample(logits: Tensor, base_logits: Tensor, **options: Any) -> Sample:
    """The op on the device under test; results on the CPU."""
    moved = cases.on_device({"logits": logits, "base_logits": base_logits})
    options = {name: x.to(cases.DEVICE) if isinstance(x, Tensor) else x for name, x in ({"seed": 1} | options).items()}
    return Sample(*(x.cpu() for x in dlogp_kernels.extrapolated_sample(**moved, **options)))


def check_against_definition(accuracy: Any | None, logits: Tensor, base_logits: Tensor, **options: Any) -> Sample:
    """As `check_sample`, of the op under test."""
    actual = sample(logits, base_logits, **options)
    magnitude = cases.magnitude("delta_logp", {"logits": logits, "base_logits": base_logits})
    dtype = max(logits.dtype, base_logits.dtype, key=lambda dtype: dtype.itemsize)
    check_sample(accuracy, "extrapolated_sample", actual, logits, base_logits, magnitude, dtype, **options)
    return actual
