"""Peak memory over inputs and results, in a process of its own: nothing of size N×V."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from cases import LINEAR_OPS, OPS
from paths import HELPERS
from tolerances import MEMORY_MIB

HELPER = HELPERS / "peak_memory.py"
#: Logits of 195 MiB for each model; twice that in float32, and once more for their gradient.
MEASURED = {"n": 2048, "d": 256, "v": 50_000, "dtype": "bfloat16", "wanted": [], "view": ""}
ALL_OF_A_PAIR = ["hidden", "weight", "bias", "base_hidden", "base_weight", "base_bias"]

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.served_by("cpu", "reference"),
    pytest.mark.skipif(
        not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of a process is reset by Linux only"
    ),
]


@pytest.fixture(scope="module")
def measuring_process() -> Iterator[subprocess.Popen[str]]:
    # Freed blocks go back at once: what malloc keeps for later varies from run to run, and is not the op's.
    # What an op allocates anew for each block is given in large pages: of small ones the kernel clears a million.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, str(HELPER)], text=True, env=environment, **pipes) as process:
        yield process
        process.kill()  # which a measurement that hangs would keep waiting


@pytest.fixture
def peaks(backend, measuring_process, record_property):
    def measure(op: str, **changes) -> list[float]:
        """MiB over inputs and results, of forward and of backward if gradients are wanted."""
        case = MEASURED | {"backend": backend, "op": op} | changes
        if backend == "reference":
            case |= {"n": min(case["n"], 1024), "d": changes.get("d", 64)}  # several of its blocks of rows; slower
        print(json.dumps(case), file=measuring_process.stdin, flush=True)
        answer = measuring_process.stdout.readline()
        assert answer != "failed\n", "the process wrote why to stderr"
        measured = json.loads(answer)
        record_property(f"{op} MiB", measured)
        print(case, measured)
        return measured

    return measure


@pytest.fixture
def peak(peaks):
    """Of the last pass alone."""
    return lambda op, **changes: peaks(op, **changes)[-1]


@pytest.fixture
def compiled_only(backend):
    if backend == "reference":
        pytest.skip("slow there, and the same code as in the cases that run")


@pytest.mark.parametrize("op", OPS)
def test_forward_and_backward_of_the_model(backend, peaks, op):
    forward, backward = peaks(op, wanted=["hidden", "weight", "bias"] if "linear" in op else ["logits"])
    assert forward <= MEMORY_MIB[backend][0]
    assert backward <= MEMORY_MIB[backend][1]


@pytest.mark.served_by("reference")
@pytest.mark.parametrize("op", LINEAR_OPS)
def test_forward_keeps_a_smaller_limit(peak, op):
    """The float32 logits of these rows alone would take 98 MiB for each model."""
    assert peak(op, n=512, workspace=32 * 2**20) <= 32


@pytest.mark.usefixtures("compiled_only")
def test_forward_in_float32(backend, peak):
    assert peak("linear_delta_logp", dtype="float32") <= MEMORY_MIB[backend][0]


@pytest.mark.usefixtures("compiled_only")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_sampling_from_hidden_states(backend, peak, dtype):
    """Of the 1024 rows' logits, 391 MiB for both models, nothing remains."""
    options = {"seed": 1, "gamma": 0.1, "criterion": "kl", "threshold": 0.1}
    assert peak("linear_extrapolated_sample", n=1024, dtype=dtype, options=options) <= MEMORY_MIB[backend][0]


@pytest.mark.usefixtures("compiled_only")
@pytest.mark.parametrize(
    ("op", "wanted", "dtype"),
    [("linear_logp", ["hidden", "weight", "bias"], "float32"), ("linear_delta_logp", ALL_OF_A_PAIR, "bfloat16")],
    ids=["linear_logp-float32", "linear_delta_logp-bfloat16"],
)
def test_backward_of_all_inputs(backend, peak, op, wanted, dtype):
    assert peak(op, wanted=wanted, dtype=dtype) <= MEMORY_MIB[backend][1]


@pytest.mark.usefixtures("compiled_only")
def test_a_frozen_weight_has_no_buffer(peak):
    """Its gradient would take 117 MiB, 234 MiB in float32."""
    assert peak("linear_logp", wanted=["hidden"], n=64, d=2048, v=30_000) <= 64


def test_given_logits_without_the_last_position(backend, peak):
    """`logits[:, :-1]` has no flat view; a copy of it would be as large as all logits, 780 MiB."""
    assert peak("logp", view="all but the last", n=8192) <= MEMORY_MIB[backend][0]


@pytest.mark.usefixtures("compiled_only")
def test_does_not_grow_with_tokens(peak):
    small, large = (peak("linear_delta_logp", n=n, d=32, v=20_000) for n in (512, 8192))
    assert large <= small + 16


def test_policy_loss(backend, peak):
    """Beside the gradient what the forward pass leaves for it, and hardly anything else."""
    if backend == "reference":
        pytest.skip("plain PyTorch has a tensor for each step of the formula")
    tensor = 4 * 2**22 / 2**20
    assert peak("policy_loss", n=2**22) <= 1.02 * tensor + 1


@pytest.mark.parametrize("options", [{}, {"importance": "sequence"}], ids=str)
def test_linear_policy_loss(backend, peak, options):
    """Of the logits, 195 MiB and twice that in float32, nothing remains; float32 gradients wait for backward."""
    n, d, v = 2048, 64, 50_000
    waiting = 4 * d * (n + v) / 2**20
    assert peak("linear_policy_loss", n=n, d=d, v=v, options=options) <= MEMORY_MIB[backend][1] + waiting


@pytest.mark.parametrize("workspace", [24, 48])
def test_linear_policy_loss_in_a_small_workspace(peak, workspace):
    """Converted tiles of a wide weight count, and the parts of its gradient."""
    n, d, v = 256, 1024, 20_000
    waiting = 4 * d * (n + v) / 2**20
    assert peak("linear_policy_loss", n=n, d=d, v=v, workspace=workspace * 2**20) <= workspace + waiting
