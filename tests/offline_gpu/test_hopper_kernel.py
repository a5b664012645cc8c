"""The kernels for Hopper without a GPU: run on the CPU by a stand-in for their instructions, and as compiled."""

import itertools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from cases import Inputs, check_statistics, from_logits, is_pair, make_inputs, truth
from hopper_emulation import KERNEL, UNTOUCHED, WHY_NOT, Forward, Launch, Launched, forward, gradient, statistics, units
from tolerances import CERTAINTY_ERROR, Accuracy
from torch import Tensor

from dlogp_kernels.reference.statistics import transform_logits

emulation = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
BF16, FP16 = torch.bfloat16, torch.float16
ONE, PAIR = "linear_logp", "linear_delta_logp"
BOTH = pytest.mark.parametrize("op", [ONE, PAIR])
COLUMNS = {ONE: 256, PAIR: 160}  # of a tile
LAUNCHES = (Launch(2), Launch(4, backwards=True), Launch(7, late_copies=True), Launch(2, True, True))
KERNELS = 12  # forward of one model, of a pair, and backward; of either dtype; with a transform of logits or without
SOFTCAP = {"temperature": 0.7, "softcap": 5.0, "base_softcap": 9.0, "logit_scale": 1.3, "base_logit_scale": 0.8}


@pytest.fixture
def accuracy(record_property) -> Accuracy:
    """Asserts tolerances.py."""
    return Accuracy(lambda op, quantity, dtype, error, limit: record_property(f"{op} {quantity} {dtype} error", error))


def options_of(op: str, options: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in options.items() if is_pair(op) or not name.startswith("base_")}


def between_nans(inputs: Inputs) -> Inputs:
    """The same matrices with NaN behind every row, which begins at a multiple of 16 bytes."""
    padded = dict(inputs)
    for name, x in inputs.items():
        if name.endswith(("hidden", "weight")):
            wide = torch.full((len(x), -(-x.shape[1] // 8) * 8 + 8), torch.nan, dtype=x.dtype)
            padded[name] = wide[:, : x.shape[1]].copy_(x)
    return padded


def check_written(result: Forward, target: Tensor, count: int) -> None:
    """Every number of the first `count` rows and of their targets that are not ignored, and no other."""
    written = result.state != UNTOUCHED
    assert written[..., :count].all() and not written[..., count:].any()
    expected = torch.zeros_like(result.target_logits, dtype=torch.bool)
    expected[:, :count] = (target.view(len(target), -1)[:count] >= 0).t().repeat(len(expected) // target[0].numel(), 1)
    assert torch.equal(result.target_logits != UNTOUCHED, expected)


#: Rows, V, D, K, dtype, bias, options, splits.
CASES = {
    "three tiles of rows, ragged tiles of tokens, three targets": (300, 700, 100, 3, BF16, False, {}, 2),
    "a single tile": (5, 9, 64, None, BF16, False, {}, 1),
    "a single tile of rows, three targets": (128, 700, 136, 3, BF16, False, {}, 2),
    "whole tiles": (256, 1280, 128, None, BF16, False, {}, 3),
    "more splits than tiles": (40, 330, 72, 2, FP16, False, {"temperature": 1.4}, 6),
    "bias and softcap": (130, 531, 136, None, BF16, True, SOFTCAP, 2),
    "bias and temperature": (33, 300, 200, 3, FP16, True, {"temperature": 0.6}, 1),
}


@emulation
@BOTH
@pytest.mark.parametrize("name", CASES)
def test_statistics(accuracy, op, name):
    rows, v, d, k, dtype, bias, options, splits = CASES[name]
    inputs = make_inputs(op, rows, v=v, d=d, k=k, dtype=dtype, bias=bias)
    options = options_of(op, options)
    launch = LAUNCHES[(list(CASES).index(name) + is_pair(op)) % len(LAUNCHES)]
    result = forward(op, between_nans(inputs), splits, launch=launch, **options)
    check_written(result, inputs["target"], rows)
    check_statistics(accuracy, op, inputs, statistics(op, result, rows, **options), **options)


@emulation
@BOTH
def test_log_p_near_zero(op):
    """A target with nearly all of the mass, in every place of a tile and of either model: relative to log p."""
    rows, v = 128, 600
    target = torch.arange(rows) * 37 % v
    gap = torch.linspace(3, 84, rows).round()[:, None]
    at_target = torch.nn.functional.one_hot(target, v)
    elsewhere = torch.arange(v) % 3 / 2 - 40
    logits = torch.where(at_target > 0, elsewhere + gap, elsewhere)
    inputs = from_logits(op, logits, torch.where(at_target > 0, elsewhere + gap.flip(0), elsewhere), target, BF16)
    stats, expected = statistics(op, forward(op, inputs, splits=2), rows), truth(op, inputs)
    for name in ("logp", "base_logp")[: 1 + is_pair(op)]:
        relative = (getattr(stats, name).view(-1) / getattr(expected, name) - 1).abs()
        assert getattr(expected, name).abs().min() < 1e-30
        assert relative.max() <= CERTAINTY_ERROR[torch.float32], f"{name} of row {relative.argmax()}"


@emulation
@pytest.mark.parametrize("token", [0, 3, 326, 699])
@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("impossible_for", ["", "base_"])
def test_a_token_that_one_model_alone_can_give(accuracy, token, capped, impossible_for):
    """A KL is infinite, unless a softcap of the base makes the token possible for it too."""
    options = {"base_softcap": 5.0} if capped else {}
    inputs = make_inputs(PAIR, 20, v=700, d=64, dtype=BF16)
    inputs["target"][:4] = token
    inputs[f"{impossible_for}bias"][token] = -torch.inf
    if not capped:  # what neither can give
        inputs["bias"][5] = inputs["base_bias"][5] = -torch.inf
    stats = statistics(PAIR, forward(PAIR, inputs, **options), 20, **options)
    check_statistics(accuracy, PAIR, inputs, stats, **options)
    infinite, finite = (stats.kl, stats.reverse_kl) if impossible_for else (stats.reverse_kl, stats.kl)
    assert infinite.isinf().all() != (capped and impossible_for == "base_") and finite.isfinite().all()


@emulation
@BOTH
def test_a_range_of_the_rows_that_are_not_ignored(accuracy, op):
    """States are of rows row_index[first:]; behind num_rows is no row, whatever the hidden states are there."""
    rows, first, num_rows = 256, 128, 301
    row_index = torch.cat([torch.arange(1, 641, 2), torch.full((321,), 640)])
    inputs = make_inputs(op, 641, v=400, d=64, k=2, dtype=BF16)
    inputs["target"][::3, 0] = inputs["target"][::2] = -100
    of_rows = row_index[first:num_rows]
    taken = {name: x[of_rows] if name.endswith("hidden") else x for name, x in inputs.items()}
    expected = taken | {"target": inputs["target"][of_rows]}
    for name in ("hidden", "base_hidden")[: 1 + is_pair(op)]:
        taken[name] = torch.cat([taken[name], torch.full_like(taken[name], torch.nan)])[:rows]
    result = forward(op, taken, rows=rows, row_index=row_index, num_rows=num_rows, first=first, launch=LAUNCHES[2])
    check_written(result, expected["target"], len(of_rows))
    ignored = (expected["target"] < 0).t().repeat(1 + is_pair(op), 1)
    result.target_logits[:, : len(of_rows)][ignored] = 0
    stats = statistics(op, result, len(of_rows))
    names = [name for name in stats._fields if name.endswith("logp")]
    of_ignored = {name: getattr(stats, name).masked_fill(expected["target"] < 0, 0) for name in names}
    check_statistics(accuracy, op, expected, stats._replace(**of_ignored))
    for fewer in (first, 0):  # which the device alone knows
        result = forward(op, taken, rows=rows, row_index=row_index, num_rows=fewer, first=first)
        check_written(result, expected["target"], 0)


@emulation
@BOTH
def test_the_end_of_all_rows(op):
    """The same without row_index; the bits are those of all rows at once, by clusters of one block too."""
    inputs = make_inputs(op, 300, v=400, d=64, dtype=BF16)
    whole = forward(op, inputs)
    last = {n: x[180:] if n.endswith(("hidden", "target")) else x for n, x in inputs.items()}
    alone = forward(op, last, launch=LAUNCHES[3])
    assert alone.launched.cluster == 1 and torch.equal(alone.state, whole.state[..., 180:])
    part = forward(op, {n: x[130:] if n.endswith("hidden") else x for n, x in inputs.items()}, rows=256, first=130)
    check_written(part, inputs["target"], 170)
    assert torch.equal(part.state[..., :170], whole.state[..., 130:])
    assert torch.equal(part.target_logits[:, :170], whole.target_logits[:, 130:])


@emulation
@BOTH
def test_bits_do_not_depend_on_the_launch(op):
    inputs = make_inputs(op, 520, v=900, d=136, k=2, dtype=BF16, bias=False)
    first, *others = (forward(op, inputs, splits=2, launch=launch) for launch in LAUNCHES)
    for other in others:
        assert torch.equal(first.state, other.state) and torch.equal(first.target_logits, other.target_logits)


@emulation
@BOTH
def test_a_row_with_nan_leaves_the_others_alone(op):
    inputs = make_inputs(op, 140, v=300, d=64, dtype=BF16)
    expected = forward(op, inputs)
    inputs["hidden"][70, 3] = torch.nan
    result = forward(op, inputs)
    others = torch.arange(140) != 70
    assert torch.equal(result.state[..., others], expected.state[..., others])
    assert statistics(op, result, 140).logp.isnan().flatten().nonzero().tolist() == [[70]]


@emulation
@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize(("dtype", "options"), [(BF16, {}), (FP16, {"softcap": 5.0, "temperature": 0.7})])
def test_gradient_by_the_logits(dtype, options, launch):
    """Of a block of tokens and rows 20 to 320, with three targets, of which two may be the same."""
    rows, first, first_token, v = 320, 20, 64, 500
    inputs = make_inputs(ONE, rows, v=v, d=100, k=3, dtype=dtype, bias=bool(options))
    target = inputs["target"]
    target[::2, 1], target[::7, 2] = target[::2, 0], -100
    target_terms, (of_p, of_plogp) = torch.randn(rows, 3), torch.randn(2, rows)
    raw = inputs["hidden"].double() @ inputs["weight"].double().t() + inputs.get("bias", torch.zeros(v)).double()
    raw.requires_grad_()
    z = transform_logits(raw, **options)
    (slope,) = torch.autograd.grad(z.sum(), raw)
    largest, log_sum = z.detach().amax(1), (z - z.amax(1, keepdim=True)).exp().sum(1).log().detach()
    logp = z.detach() - (largest + log_sum)[:, None]
    expected = logp.exp() * (of_p[:, None] + of_plogp[:, None] * logp)
    for k in range(3):
        expected += torch.where(torch.arange(v) == target[:, k : k + 1], target_terms[:, k : k + 1], 0)
    expected = (slope * expected)[first:, first_token:]
    block = inputs | {"hidden": inputs["hidden"][first:]}
    block |= {name: x[first_token:] for name, x in inputs.items() if name in ("weight", "bias")}
    row_terms = torch.stack([largest, log_sum, of_p, of_plogp]).float()
    actual = gradient(between_nans(block), row_terms, target_terms, first, first_token, launch, **options)
    torch.testing.assert_close(actual.double(), expected, rtol=0.51 * torch.finfo(dtype).eps + 1e-4, atol=1e-6)


@emulation
def test_gradient_by_an_impossible_logit_at_a_temperature_near_0():
    """Its log p is −inf in float32, and 0 · inf must not be formed."""
    rows, temperature = 130, 1e-14
    inputs = make_inputs(ONE, rows, v=300, d=64, k=1, dtype=BF16)
    inputs["bias"][7] = -torch.inf
    raw = inputs["hidden"].float() @ inputs["weight"].float().t() + inputs["bias"].float()
    zero = torch.zeros(rows)
    row_terms = torch.stack([raw.amax(1) / temperature, zero, zero - 1, zero - 1])
    actual = gradient(inputs, row_terms, torch.zeros(rows, 1), 0, 0, LAUNCHES[0], temperature=temperature)
    assert not actual.isnan().any() and actual[:, 7].count_nonzero() == 0


@emulation
@BOTH
@pytest.mark.parametrize("blocks", [1, 2])
def test_every_tile_is_computed_once(op, blocks):
    """A split of each group of row tiles by one cluster, and splits whose tiles become fewer by one at most."""
    cases = itertools.product((1, 128, 129, 300, 4096, 4097, 9000), (1, 2, 3, 7, 50), (1, 2, 3, 5, 8, 132), (1, 3, 16))
    shapes = [(rows, tiles * COLUMNS[op] - rows % 5, splits, panel) for rows, tiles, splits, panel in cases]
    for (rows, v, splits, _), of_clusters in zip(shapes, units(1 + is_pair(op), blocks, shapes), strict=True):
        groups = range(0, rows, 128 * blocks)
        first, others = of_clusters[:, :1].long(), of_clusters[:, 1:]
        assert torch.equal(others, (first + torch.tensor([128, 0, 0, 0]))[:, : blocks - 1])
        found = first[:, 0].tolist()
        expected = [[row, split] for row in groups for split in range(splits)]
        assert sorted(unit[:2] for unit in found) == expected
        ranges = sorted({tuple(unit[1:]) for unit in found})
        assert [split for split, *_ in ranges] == list(range(splits))
        ends = [end for *_, end in ranges]
        assert [begin for _, begin, _ in ranges] == [0, *ends[:-1]] and ends[-1] == -(-v // COLUMNS[op])
        tiles = [end - begin for _, begin, end in ranges]
        assert tiles == sorted(tiles, reverse=True) and tiles[0] - tiles[-1] <= 1


@emulation
@BOTH
@pytest.mark.parametrize(("dtype", "type_"), [(BF16, 9), (FP16, 6)])
@pytest.mark.parametrize(("rows", "blocks"), [(128, 1), (129, 2)])
def test_what_the_launcher_asks_for(op, dtype, type_, rows, blocks):
    """Clusters of one block for a single tile of rows, else of two, each of which copies its part of the weight."""
    inputs = between_nans(make_inputs(op, rows, v=70, d=100, dtype=dtype))
    result = forward(op, inputs, launch=Launch(3))
    shared_bytes = result.launched.shared_bytes
    assert result.launched == Launched(4 - blocks, 384, blocks, shared_bytes, shared_bytes)
    assert shared_bytes <= 232_448
    expected = []
    for prefix in ("", "base_")[: 1 + is_pair(op)]:
        for name, box_rows in (("hidden", 128), ("weight", COLUMNS[op] // blocks)):
            x = inputs[f"{prefix}{name}"]
            matrix = [type_, 2, x.data_ptr(), x.shape[1], len(x), 2 * x.stride(0)]
            # Boxes of 64 elements, 128 bytes, swizzled like that (3); fetched to L2 by 256 bytes (3); 0 outside (0).
            expected.append([*matrix, 64, box_rows, 1, 1, 0, 3, 3, 0])
    assert result.maps == expected


@emulation
def test_rows_that_the_hardware_cannot_copy_are_an_error():
    with pytest.raises(RuntimeError, match="begin on 16 bytes"):
        forward(ONE, make_inputs(ONE, 5, v=70, d=100, dtype=BF16))


def test_what_nvcc_makes_of_it(tmp_path):
    """All in registers, products of two stages under way, and no wait for memory between them."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    triton = pytest.importorskip("triton")
    built = tmp_path / "built.cubin"
    flags = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas=-v"]
    run = subprocess.run(["nvcc", *flags, "-cubin", KERNEL, "-o", built], capture_output=True, text=True, check=True)
    said = run.stdout + run.stderr
    # Not that registers can not be handed over (C7508), nor that products wait for each other (C7510 to C7520).
    assert not re.search(r"setmaxnreg|serializ|C75\d\d", said), said
    assert said.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == KERNELS
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    run = subprocess.run([cuobjdump, "-sass", built], capture_output=True, text=True, check=True)
    kernels = run.stdout.split("Function : ")[1:]
    assert len(kernels) == KERNELS
    for kernel in kernels:
        name = kernel.split(maxsplit=1)[0]
        assert max(map(int, re.findall(r"\bR(\d+)\b", kernel))) < 232, name
        assert "UTMALDG.2D.MULTICAST" in kernel, name
        first, last = kernel.index("HGMMA.64x"), kernel.rindex("HGMMA.64x")
        assert "WARPGROUP.DEPBAR.LE gsb0, 0x1" in kernel[first:last], name
        # Nor a release to the cluster, which took a third of the speed.
        assert "MEMBAR" not in kernel[first:last], name
