"""The CUDA C++ kernels without a GPU: run on the CPU by a stand-in for CUDA, and what the compiler made of them."""

import itertools
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_emulation import WHY_NOT, Launch, emulated
from paths import ROOT
from sampling import (
    BF16,
    FILTERS,
    FP16,
    FP32,
    adversarial_pair,
    check_against_definition,
    check_part_of_a_vocabulary,
    criterion_options,
    random_pair,
    sample,
)
from tolerances import CUDA_REGISTERS, CUDA_STACK_BYTES, Accuracy

import dlogp_kernels
from dlogp_kernels import backends
from dlogp_kernels.reference.sampling import CRITERIA

emulation = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
LAUNCHES = (Launch(1), Launch(2, backwards=True), Launch(4), Launch(1, kept=False), Launch(8, kept=False))


@pytest.fixture
def accuracy(record_property) -> Accuracy:
    """Asserts tolerances.py."""
    return Accuracy(lambda op, quantity, dtype, error, limit: record_property(f"{op} {quantity} {dtype} error", error))


def equal(drawn: dlogp_kernels.Sample, other: dlogp_kernels.Sample) -> bool:
    return all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(drawn, other, strict=True))


@emulation
@pytest.mark.parametrize(("number", "criterion"), list(enumerate(CRITERIA)))
def test_draws_what_the_definition_draws(accuracy, number, criterion):
    logits, base_logits = adversarial_pair(301, FP32)
    for turn in range(2):
        filters = list(FILTERS.values())[(number + 3 * turn) % len(FILTERS)]
        options = criterion_options(criterion) | filters
        options |= {"temperature": (0.7, 1.0, 0.0)[(number + turn) % 3], "gamma": (0.1, 0.0, 1.0)[number % 3]}
        with emulated(LAUNCHES[(number + turn) % len(LAUNCHES)]):
            draft = ("base", "rl")[turn]
            rows = slice((number + 2 * turn) % 4, None, 4)  # over the criteria, every row with either draft
            check_against_definition(
                accuracy, logits[rows], base_logits[rows], draft=draft, seed=7, step=number, **options
            )


@emulation
@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
def test_every_filter_on_adversarial_rows(accuracy, filters):
    logits, base_logits = adversarial_pair(301, FP32)
    with emulated(Launch(2)):
        check_against_definition(accuracy, logits, base_logits, gamma=0.3, temperature=0.7, seed=3, **filters)


@emulation
@pytest.mark.parametrize("v", [1, 2, 3, 5, 63, 64, 65, 1025, 4099])
def test_any_vocabulary(accuracy, v):
    logits, base_logits = random_pair(2, v, FP32)
    with emulated(Launch(4)):
        for filters in ({"top_k": 40, "top_p": 0.9, "min_p": 0.02}, {}):
            options = filters | {"temperature": 0.7, "gamma": 0.3, "criterion": "delta_logp", "threshold": -0.2}
            check_against_definition(accuracy, logits, base_logits, seed=3, **options)


@emulation
def test_a_part_of_a_vocabulary_has_the_noise_of_the_whole():
    with emulated(Launch(2)):
        check_part_of_a_vocabulary(1025, 204, 903)


@emulation
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_dtypes(accuracy, dtype):
    logits, base_logits = random_pair(3, 700, dtype)
    options = {"gamma": 0.1, "seed": 5, "top_p": 0.9, "top_k": 30}
    with emulated(Launch(2)):
        drawn = check_against_definition(accuracy, logits, base_logits, **options)
        assert equal(drawn, sample(logits.float(), base_logits.float(), **options))
        assert equal(drawn, sample(logits.float(), base_logits, **options))
    with emulated(Launch(1, kept=False)):
        assert equal(drawn, sample(logits, base_logits, **options))


@emulation
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.7}, {"top_k": 50, "min_p": 0.01}], ids=str)
def test_a_whole_vocabulary(accuracy, filters):
    """bfloat16 in 8 blocks, as on a GPU; the logits lie in aligned groups."""
    logits, base_logits = random_pair(1, 151_936, BF16)
    with emulated(Launch(8)):
        check_against_definition(accuracy, logits, base_logits, gamma=0.1, seed=11, **filters)


@emulation
@pytest.mark.parametrize("top_p", [1e-9, 0.5, 0.999])
def test_more_tokens_than_a_list_holds(accuracy, top_p):
    """Nearly uniform logits: top-p keeps more than 2048 tokens of a block, and buckets hold many equal ones."""
    logits, base_logits = torch.zeros(3, 9001), torch.zeros(3, 9001)
    logits[1] = torch.arange(9001) * 1e-9
    logits[2] = (torch.arange(9001) % 2) * 1e-3
    base_logits[1] = -torch.arange(9001) / 9001
    with emulated(Launch(1)):
        check_against_definition(accuracy, logits, base_logits, top_p=top_p, seed=2)
        check_against_definition(accuracy, logits, base_logits, top_k=5000, top_p=top_p, seed=2)
    with emulated(Launch(8)):
        check_against_definition(accuracy, logits, base_logits, top_k=5000, top_p=top_p, seed=2, gamma=0.1)


@emulation
def test_zeros_of_both_signs_are_equal():
    """They fall to a filter together, as in the definition."""
    logits = torch.full((1, 40), -5.0)
    logits[0, :3] = torch.tensor([1.0, 0.0, -0.0])
    with emulated(Launch(1)):
        tokens = {int(sample(logits, logits, top_k=2, seed=seed).token) for seed in range(40)}
    assert tokens == {0, 1, 2}


@emulation
@pytest.mark.parametrize(
    ("criterion", "filters"),
    [
        ("delta_logp", {"top_p": 0.9}),
        ("kl", {"temperature": 0.7}),
        ("all", {"top_k": 50, "min_p": 0.01}),
        ("all", {"top_k": 700, "top_p": 0.95, "temperature": 1.3}),
    ],
    ids=str,
)
def test_bits_depend_neither_on_the_launch_nor_on_the_batch(criterion, filters):
    logits, base_logits = random_pair(4, 3001, FP32)
    row_id = torch.tensor([5, 9, 2**31, 3])
    options = criterion_options(criterion) | filters | {"gamma": 0.2, "row_id": row_id}
    launches = [
        Launch(*launch) for launch in itertools.product((1, 2, 16), (True,), (False, True))
    ] + [Launch(8, kept=False)]  # fmt: skip
    drawn = []
    for launch in launches:
        with emulated(launch):
            drawn.append(sample(logits, base_logits, **options))
    assert all(equal(drawn[0], other) for other in drawn[1:])
    with emulated(Launch(2)):
        one = slice(2, 3)
        alone = sample(logits[one], base_logits[one], **(options | {"row_id": row_id[one]}))
    assert equal(dlogp_kernels.Sample(*(x[one] for x in drawn[0])), alone)


@emulation
def test_strides():
    logits, base_logits = random_pair(6, 304, FP32)
    options = {"gamma": 0.3, "top_p": 0.9, "temperature": 0.8}
    wide = torch.full((6, 611), torch.nan)
    wide[:, 1:609:2] = logits
    padded = torch.full((3, 4, 304), torch.nan)
    padded[:, 1:3] = base_logits.view(3, 2, 304)
    with emulated(Launch(2)):
        expected = sample(logits, base_logits, **options)
        assert equal(expected, sample(wide[:, 1:609:2], base_logits, **options))
        shaped = sample(logits.view(3, 2, 304), padded[:, 1:3], **options)
        assert equal(expected, dlogp_kernels.Sample(*(x.flatten() for x in shaped)))
        turned = sample(logits.view(3, 2, 304).transpose(0, 1), base_logits.view(3, 2, 304).transpose(0, 1),
                        row_id=torch.arange(6).view(3, 2).t(), **options)  # fmt: skip
        assert equal(expected, dlogp_kernels.Sample(*(x.t().flatten() for x in turned)))
        assert equal(expected, sample(logits.t().contiguous().t(), base_logits, **options))


@emulation
def test_no_rows_one_row_and_expanded_rows():
    logits, base_logits = random_pair(1, 100, FP32)
    with emulated(Launch(1)):
        assert sample(logits[:0], base_logits[:0]).token.shape == (0,)
        expected = sample(logits.repeat(5, 1), base_logits.repeat(5, 1))
        assert equal(expected, sample(logits.expand(5, -1), base_logits.expand(5, -1)))


@emulation
def test_bad_rows_give_minus_one_and_nan():
    v = 301
    logits, base_logits = random_pair(9, v, FP32)
    with emulated(Launch(2)):
        expected = sample(logits, base_logits, top_p=0.9)
        for x, first in ((logits, 1), (base_logits, 4)):
            x[first, v - 1], x[first + 1, 150], x[first + 2] = torch.nan, torch.inf, -torch.inf
        drawn = sample(logits, base_logits, top_p=0.9)
    bad = torch.arange(1, 7)
    assert (drawn.token[bad] == -1).all() and (drawn.draft_token[bad] == -1).all() and not drawn.selected[bad].any()
    assert all(x[bad].isnan().all() for x in drawn[3:])
    for value, other in zip(drawn, expected, strict=True):
        assert torch.equal(value[[0, 7, 8]], other[[0, 7, 8]])


@emulation
def test_huge_scores_stay_inside_the_vocabulary():
    z = torch.full((3, 70), 3e38)
    z[1, ::2] = -3e38
    with emulated(Launch(2)):
        for options in ({}, {"top_k": 5, "top_p": 0.5}, {"min_p": 0.1}):
            for temperature, gamma in ((1e-3, 0.0), (1.0, 3.0), (1e-3, 3.0)):
                drawn = sample(z, -z, temperature=temperature, gamma=gamma, **options)
                for token in (drawn.token, drawn.draft_token):
                    assert ((token >= -1) & (token < 70)).all()


@emulation
@pytest.mark.parametrize("seed", [1, 2**63, 2**64 - 1])
def test_seed_and_step_from_tensors(seed):
    logits, base_logits = random_pair(4, 200, FP32)
    signed = torch.tensor([seed - 2**64 if seed >= 2**63 else seed])
    steps = torch.tensor([0, 17, 2**31, 2**32 - 1])
    with emulated(Launch(1)):
        drawn = sample(logits, base_logits, seed=signed, step=steps)
        for row, step in enumerate(steps.tolist()):
            one = slice(row, row + 1)
            number = sample(logits[one], base_logits[one], seed=seed, step=step, row_id=torch.tensor([row]))
            assert equal(number, dlogp_kernels.Sample(*(x[one] for x in drawn)))


# What nvcc made of them.

EXTENSION = sorted(Path(dlogp_kernels.__file__).parent.glob("_cuda*.so"))
built = pytest.mark.skipif(not EXTENSION, reason="the CUDA extension was not built: no nvcc")
#: Kernels that an architecture needs, by their template arguments; the others of its code do nothing.
NEEDED = {
    "sm_80": {("__nv_bfloat16", "0"), ("__half", "0"), ("f", "0")},
    "sm_90a": {("__nv_bfloat16", "1"), ("__half", "1"), ("f", "1"), ("f", "0")},
    "sm_100a": {("__nv_bfloat16", "1"), ("__half", "1"), ("f", "1"), ("f", "0")},
}


def test_the_extension_is_there_where_it_can_be_built():
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    assert EXTENSION
    if torch.version.cuda is None:
        assert "built without CUDA" in str(backends.unavailable("cuda", "extrapolated_sample", "cuda"))


@built
def test_the_extension_finds_every_symbol_where_python_has_loaded_torch(tmp_path):
    """Python loads torch's libraries for itself alone; a CPU build of torch gets a stand-in for libtorch_cuda."""
    loading = "import sys, torch, ctypes; [ctypes.CDLL(path, mode=ctypes.RTLD_LOCAL) for path in sys.argv[1:]]"
    stand_in = tmp_path / "libtorch_cuda.so"
    if torch.version.cuda is None:
        runpy.run_path(str(ROOT / "setup.py"))["link_stand_in"](tmp_path)
    libraries = [path for path in (stand_in, EXTENSION[0]) if path.exists()]
    run = subprocess.run([sys.executable, "-c", loading, *libraries], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@built
def test_registers_and_stack_of_every_architecture():
    triton = pytest.importorskip("triton")
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    run = subprocess.run([cuobjdump, "--dump-resource-usage", EXTENSION[0]], capture_output=True, text=True, check=True)
    found: dict[str, set[tuple[str, str]]] = {}
    arch = ""
    for line, following in itertools.pairwise(run.stdout.splitlines()):
        arch = line.removeprefix("arch = ") if line.startswith("arch = ") else arch
        kernel = re.search(r"extrapolated_sample_kernelI(?:\d*)(\w+?)Lb([01])E", line)
        if kernel is None:
            continue
        registers, stack = (int(re.search(rf"{name}:(\d+)", following)[1]) for name in ("REG", "STACK"))
        if registers < 16:
            continue  # one that does nothing
        found.setdefault(arch, set()).add((kernel[1], kernel[2]))
        assert registers <= CUDA_REGISTERS, f"{arch} {line}"
        assert stack <= CUDA_STACK_BYTES[arch], f"{arch} {line}"
    assert found == NEEDED
