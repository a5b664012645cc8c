"""`python -m benchmarks gpu` without a GPU: the whole flow with tiny workloads, and what goes wrong in it."""

import argparse
import json
import os
import pickle
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT))

from benchmarks import bench_linear_policy_loss, sampling  # noqa: E402
from benchmarks.__main__ import main  # noqa: E402
from benchmarks.gpu import checks, command, policy, table  # noqa: E402
from benchmarks.gpu.cases import REAL, TINY, Case, Sizes, plan, tuning_plan  # noqa: E402
from benchmarks.gpu.measure import run_case  # noqa: E402
from benchmarks.gpu.session import OUT_OF_TIME, Session  # noqa: E402
from benchmarks.gpu.worker import Worker  # noqa: E402
from benchmarks.peers import MISSING, PEERS, Peer, Single, Summed, peers_for, with_trl_loss  # noqa: E402
from benchmarks.records import Record, Run, environment, read, record  # noqa: E402
from benchmarks.registry import BENCHES  # noqa: E402
from benchmarks.shapes import Shape, Workload  # noqa: E402
from dlogp_kernels import backends  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    # Of this process, and of those that are started: tiny workloads only lose by more on a busy machine.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Peers as other libraries may turn out to be. The measuring process imports this module to find them.


def _right():
    return lambda hidden, weight, target, softcap=None: Single(*BENCHES["linear_logp"].eager(hidden, weight, target))


def _no_entropy():
    return lambda hidden, weight, target, softcap=None: Single(_right()(hidden, weight, target).logp)


def _summed():
    return lambda hidden, weight, target, softcap=None: Summed(
        torch.nn.functional.cross_entropy(hidden @ weight.t(), target, reduction="sum")
    )


def _summed_wrongly():
    return lambda hidden, weight, target, softcap=None: Summed(
        torch.nn.functional.cross_entropy(hidden @ weight.t(), target, reduction="sum") * 1.5
    )


def _wrong():
    return lambda hidden, weight, target, softcap=None: Single(_right()(hidden, weight, target).logp + 1)


def _raises():
    return lambda hidden, weight, target, softcap=None: [][1]


def _raises_later():
    calls = []

    def function(hidden, weight, target, softcap=None):
        calls.append(1)
        if len(calls) > 3:
            raise ValueError("enough of it")
        return _right()(hidden, weight, target)

    return function


def _ends_its_process():
    return lambda hidden, weight, target, softcap=None: os._exit(3)


def _hangs():
    return lambda hidden, weight, target, softcap=None: time.sleep(600)


def _not_importable():
    raise AssertionError("it is not there to be loaded")


def _peer(load, **fields):
    fields = {"op": "linear_logp", "modules": (), "gives": ("logp", "entropy"), **fields}
    return Peer(name=load.__name__.strip("_"), distribution="none", load=load, **fields)


def _session(*peers: Peer, seconds: float = 60.0, **fields) -> Session:
    return Session(CPU, peers, time.monotonic() + seconds, **fields)


def _case(kind: str = "peers", op: str = "linear_logp", training: bool = False, **fields) -> Case:
    return Case(kind, Workload(op, TINY.head, TINY.n, "float32", training), seconds=0, rounds=2, **fields)


def _by_name(records: list[Record], phase: str) -> dict[str, Record]:
    return {entry.candidate: entry for entry in records if entry.phase == phase}


@pytest.fixture
def without_compiler(monkeypatch):
    """torch.compile takes seconds, and one case shows that it is called."""
    monkeypatch.setattr("torch.compile", lambda function, **_: function)


def test_all_of_it(tmp_path, monkeypatch):
    """The command from its arguments to its files, with a test of each outcome and peers of each kind."""
    (tmp_path / "conftest.py").write_text("def pytest_addoption(parser): parser.addoption('--device')\n")
    tests = tmp_path / "test_outcomes.py"
    tests.write_text(
        "import pytest\ndef test_a(request): assert request.config.getoption('--device') == 'cpu'\n"
        "def test_b(): assert 1 == 2, 'one is not two'\ndef test_c(): pytest.skip('no')\n"
        "@pytest.fixture\ndef broken(): raise OSError('gone')\ndef test_d(broken): pass\n"
    )
    peers = [_peer(_right), _peer(_raises), _peer(_not_importable, modules=("no_such",))]
    monkeypatch.setattr(command, "plan", _forward_of_one_model)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    run = command.measure(_options(tmp_path / "out", "--only=N="), peers, [tests])

    assert [run.tests[name] for name in ("passed", "failed", "errors", "skipped")] == [1, 1, 1, 1]
    assert "one is not two" in run.tests["failures"][0]["message"] and run.tests["incomplete"] == {}
    files = {path.suffix: path for path in (tmp_path / "out").iterdir()}
    assert files.keys() == {".csv", ".json", ".txt", ".log"} and "test_b" in files[".log"].read_text()
    assert read(files[".json"]) == run
    assert run.settings["mode"] == "gpu" and run.environment["libraries"] == {"none": None}

    assert {entry.case for entry in run.records} == {"compare", "peers", "small", "half ignored"}
    by_name = _by_name([e for e in run.records if e.case == "peers" and not e.training], "forward")
    assert by_name["right"].ratios["ours"][0] > 0 and by_name["right"].errors["logp"] < 1e-5
    assert by_name["raises"].skipped == "IndexError: list index out of range"
    assert by_name["not_importable"].skipped == f"{MISSING}: no_such"
    assert by_name["compiled"].skipped is None
    text = files[".txt"].read_text()
    assert text == table.report(run) + "\n"
    counts = "1 passed, 1 failed, 1 errors, 1 skipped"
    for expected in (counts, "one is not two", "IndexError: list index out of range", "| right |"):
        assert expected in text


def _forward_of_one_model(sizes: Sizes) -> list[Case]:
    return [case for case in plan(sizes) if case.work.op == "linear_logp" and not case.work.training]


def _options(out: Path, *arguments: str, minutes: float = 1.0) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args([f"--out={out}", "--device=cpu", "--tiny", f"--minutes={minutes}", *arguments])


def test_candidates_that_take_their_process_with_them():
    peers = [_peer(_hangs), _peer(_right), _peer(_ends_its_process)]
    # The compiler is left out as what ended two processes is.
    worker = Worker(CPU, peers, time.monotonic() + 60, hang_seconds=1, deaths=Counter(compiled=2))
    try:
        by_name = _by_name(worker.run(_case()), "forward")
    finally:
        worker.close()
    assert by_name["hangs"].skipped == "no progress for 1 s, its process was ended"
    assert by_name["ends_its_process"].skipped == "its process ended with exit status 3"
    assert by_name["compiled"].skipped == "ended its process 2 times"
    assert all(by_name[name].median_ms > 0 for name in ("ours", "right", "matmul"))


def test_time_runs_out(tmp_path):
    records = Worker(CPU, (), time.monotonic() - 1).run(_case("compare"))
    assert [(entry.candidate, entry.skipped) for entry in records] == [("ours", OUT_OF_TIME)]
    late = list(run_case(_case("compare"), _session(seconds=-1)))
    assert late and {entry.skipped for entry in late} == {OUT_OF_TIME}
    run = command.measure(_options(tmp_path, "--skip-tests", minutes=0), ())
    assert len(run.records) == len(plan(TINY)) and {entry.skipped for entry in run.records} == {OUT_OF_TIME}
    assert "Tests: not run." in table.report(run)


def test_tests_that_do_not_end(tmp_path):
    (tmp_path / "conftest.py").write_text("def pytest_addoption(parser): parser.addoption('--device')\n")
    hanging, never = tmp_path / "test_hanging.py", tmp_path / "test_never.py"
    hanging.write_text("import time\ndef test_a(): pass\ndef test_b(): time.sleep(60)\n")
    never.write_text("def test_a(): pass\n")
    found = checks.run_tests("cpu", 3, tmp_path / "log", [hanging])
    assert found["passed"] == 1 and found["incomplete"] == {"test_hanging.py": "stopped: out of time"}
    found = checks.run_tests("cpu", -1, tmp_path / "log", [never])
    assert found["incomplete"] == {"test_never.py": "out of time"}


def test_counts_without_a_report():
    """pytest was killed while a kernel hung: the log has what came before."""
    log = "tests/test_x.py::test_a[bf16] PASSED  [ 1%]\ntests/test_x.py::test_b FAILED  [ 2%]\ntests/test_x.py::test_c "
    assert checks._from_log(log) == {"passed": 1, "failed": 1, "errors": 0, "skipped": 0}


def test_the_test_files_exist():
    names = {path.name for path in checks._files()}
    assert {"test_ops_accuracy.py", "test_ops_gradients.py", "test_functional_reference.py"} <= names


@pytest.mark.usefixtures("without_compiler")
def test_candidates_of_each_kind():
    session = _session(_peer(_right), _peer(_no_entropy), _peer(_wrong), _peer(_raises), _peer(_raises_later))
    records = list(run_case(_case(), session))
    by_name = _by_name(records, "forward")
    assert by_name["right"].errors.keys() == {"logp", "entropy"} and by_name["no_entropy"].errors.keys() == {"logp"}
    assert by_name["wrong"].wrong and "logp is off by 1.0" in by_name["wrong"].skipped
    assert by_name["raises"].skipped == "IndexError: list index out of range" and not by_name["raises"].wrong
    # It fell out while the others were timed.
    assert by_name["raises_later"].skipped == "ValueError: enough of it"
    assert all(by_name[name].median_ms > 0 for name in ("ours", "right", "no_entropy", "compiled", "matmul"))
    assert by_name["ours"].tflops > 0 and by_name["ours"].backend in ("cpu", "reference")


def test_a_case_whose_inputs_can_not_be_built(monkeypatch):
    def build(*_):
        raise MemoryError("too much")

    monkeypatch.setattr("benchmarks.gpu.measure.build", build)
    for kind in ("compare", "half ignored"):
        (only,) = run_case(_case(kind), _session())
        assert only.skipped == "MemoryError: too much" and only.candidate == "ours"


@pytest.mark.usefixtures("without_compiler")
def test_gradients_of_what_a_library_gives():
    summed = {"gives": (), "summed": True}
    session = _session(_peer(_right), _peer(_no_entropy, gives=("logp",)), _peer(_summed, **summed))
    by_name = _by_name(list(run_case(_case(training=True), session)), "both")
    for name in ("ours", "right", "no_entropy", "summed"):
        assert max(by_name[name].errors[f"d_{leaf}"] for leaf in ("hidden", "weight")) < 1e-5, name
        assert by_name[name].errors["logp"] < 1e-5 and by_name[name].peak_mib is not None
    wrong = list(run_case(_case(training=True), _session(_peer(_summed_wrongly, **summed))))
    assert [entry.candidate for entry in wrong if entry.wrong] == ["summed_wrongly"]


@pytest.mark.usefixtures("without_compiler")
@pytest.mark.parametrize("training", [False, True])
def test_a_pair_is_two_calls(training):
    session = _session(_peer(_right), _peer(_summed, gives=(), summed=True), excluded={"eager": "not again"})
    by_name = _by_name(
        list(run_case(_case(op="linear_delta_logp", training=training), session)), "both" if training else "forward"
    )
    outputs = {"delta_logp", "logp", "base_logp", "entropy", "base_entropy"}
    gradients = {"d_hidden", "d_weight"} if training else set()
    assert by_name["right"].errors.keys() == outputs | gradients and max(by_name["right"].errors.values()) < 1e-5
    assert by_name["right"].note == "two calls, no KL" and "summed" not in by_name


@pytest.mark.usefixtures("without_compiler")
def test_the_trl_adapters():
    """The only library whose linear functions run on a CPU."""
    pytest.importorskip("trl")
    trl = [peer for peer in PEERS if peer.distribution == "trl"]
    for training in (False, True):
        work = Workload("linear_delta_logp", Shape("capped", 16, 300, softcap=5.0), 24, "float32", training)
        records = list(run_case(Case("peers", work, seconds=0, rounds=1), _session(*trl)))
        by_name = _by_name(records, "both" if training else "forward")
        for name in ("trl", "trl, with kl"):
            assert max(by_name[name].errors.values()) < 1e-5
        assert "kl" in by_name["trl, with kl"].errors


def test_few_tokens_and_backends():
    by_name = _by_name(list(run_case(_case("small"), _session())), "forward")
    for name in ("ours", "ours, reference", "eager"):
        assert by_name[name].host_us > 0 and by_name[name].gb_per_s > 0 and by_name[name].ratios["copy"][0] > 0
    assert by_name["ours, reference"].backend == "reference"
    assert "kernels for GPUs only" in by_name["ours, triton"].skipped
    given = _by_name(list(run_case(_case("compare", "delta_logp", training=True), _session())), "backward")
    assert given["ours"].gb_per_s > 0 and given["ours"].ratios["copy"][0] > 0


def _sampler():
    def function(logits, top_p=1.0):
        work = TINY.sample(len(logits), "no truncation" if top_p == 1.0 else "top-p 0.7")
        return sampling.eager_one_model(sampling.Draws(work, logits, logits))

    return function


def _loss():
    return with_trl_loss(_right())


def _loss_twice():
    return lambda **inputs: 2 * _loss()(**inputs)


def _excluded():
    return lambda logits, top_p=1.0: logits.argmin(-1)


@pytest.mark.usefixtures("without_compiler")
@pytest.mark.parametrize("variant", ["top-p 0.7", "no truncation"])
def test_samplers(variant, monkeypatch):
    """Every backend there is by its name, a pair and one model, and a library's sampler of one model."""
    monkeypatch.setattr(backends, "BACKENDS", (*backends.BACKENDS, "cuda"))
    unavailable = backends.unavailable
    monkeypatch.setattr(
        backends, "unavailable", lambda name, *rest: "not built" if name == "cuda" else unavailable(name, *rest)
    )
    peers = [_peer(load, op="extrapolated_sample", gives=(), trains=False) for load in (_sampler, _excluded, _raises)]
    case = Case("sample", TINY.sample(40, variant), seconds=0, rounds=2)
    records = list(run_case(case, _session(*peers)))
    by_name = _by_name(records, "forward")
    timed = ("ours", "ours, reference", "ours, all replaced", "ours, one model", "eager", "compiled", "sampler", "copy")
    assert all(by_name[name].median_ms > 0 and by_name[name].gb_per_s > 0 for name in timed)
    assert by_name["ours, cuda"].skipped == "not built" and "GPUs only" in by_name["ours, triton"].skipped
    assert by_name["raises"].skipped.startswith("TypeError")
    assert by_name["excluded"].wrong == (variant == "top-p 0.7")
    assert by_name["sampler"].ratios.keys() >= {"ours", "ours, one model", "copy"}
    assert by_name["ours"].errors["other token"] == 0 and by_name["ours"].errors["logp"] < 1e-5
    # As many bytes a second as it has models to read.
    one, two = by_name["ours, one model"], by_name["ours"]
    assert two.gb_per_s * two.median_ms == pytest.approx(2 * one.gb_per_s * one.median_ms)
    assert by_name["ours"].host_us > 0 and by_name["ours"].peak_mib is not None


def test_the_policy_losses(tmp_path, monkeypatch):
    """Both kinds, from the command to the records; a library's loss from hidden states, and one that is wrong."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    peers = [_peer(load, op="linear_policy_loss", gives=()) for load in (_loss, _loss_twice, _raises)]
    run = command.measure(_options(tmp_path, "--skip-tests", "--only=policy "), peers)
    assert {entry.case for entry in run.records} == {"policy loss", "policy step"}
    given = _by_name([e for e in run.records if e.case == "policy loss"], "both")
    for name in ("ours", "ours, reference", "eager", "compiled"):
        assert given[name].median_ms > 0 and given[name].gb_per_s > 0 and given[name].ratios["copy"][0] > 0
        assert given[name].errors.keys() == {"loss", "d_logp"} and max(given[name].errors.values()) < 1e-5
        assert given[name].peak_mib is not None and given[name].statistics == {}
    assert given["copy"].gb_per_s > 0 and "kernels for GPUs only" in given["ours, triton"].skipped
    step = _by_name([e for e in run.records if e.case == "policy step"], "both")
    for name in ("ours", "ours, reference", "eager", "loss"):
        assert step[name].median_ms > 0 and step[name].tflops > 0 and step[name].ratios["matmul"][0] > 0
        assert step[name].errors.keys() == {"loss", "d_hidden", "d_weight"} and max(step[name].errors.values()) < 1e-5
        assert step[name].peak_mib is not None
    assert step["loss"].ratios["ours"][0] > 0 and step["matmul, real"].median_ms > 0
    assert step["loss_twice"].wrong and "loss is off by" in step["loss_twice"].skipped
    assert step["raises"].skipped.startswith("TypeError")
    assert step["ours, reference"].backend == given["ours, reference"].backend == "reference"
    measured = {line.what: line.measured for line in table.acceptance(run)}
    assert measured["the same, beside Liger's scaled cross-entropy and its GRPO loss"] == "not measured"
    assert "GB/s" in _following(run, "`policy_loss` of 32 tokens, DAPO, forward + backward").measured


def _following(run: Run, what: str) -> table.Line:
    lines = table.acceptance(run)
    return lines[[line.what for line in lines].index(what) + 1]


def test_bytes_of_a_policy_loss():
    """13 a token forward, 8 backward: the copy moves as many, half of them read and half written."""
    (case,) = (case for case in plan(TINY) if case.kind == "policy loss")
    problem = policy._Given(case, CPU)
    assert problem.batch.mask.all() and [problem._bytes(phase) for phase in ("forward", "backward")] == [
        32 * 13,
        32 * 8,
    ]
    (copy,) = problem.floor()
    assert [_copied_bytes(copy.forward), _copied_bytes(lambda: copy.backward(None))] == [16 * 13, 16 * 8]


def _copied_bytes(call) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        call()
    (copy,) = (event for event in profile.events() if event.name == "aten::copy_")
    return copy.input_shapes[0][0]


def test_launches():
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    seen = [(cuda, False), (cuda, False), (cuda, True), (cpu, False)]
    events = [SimpleNamespace(device_type=where, is_user_annotation=annotation) for where, annotation in seen]
    assert policy._on_the_gpu(events) == 2 and policy._launches(lambda: None, CPU) is None


def test_memory_over_the_gradients(monkeypatch):
    """Of ours: what waits in float32 does not count; what forward needs is not hidden behind what backward leaves."""
    (case,) = (case for case in plan(TINY) if case.kind == "policy step")
    problem = policy._FromHidden(case, CPU)
    waiting = 4 * (24 * 16 + 300 * 16)
    for forward, whole, expected in ((waiting + 70, waiting + 5, 70), (waiting + 1, waiting + 5, 5), (0, 0, 0)):
        monkeypatch.setattr(policy, "peak_over", lambda call, device, peak=forward: SimpleNamespace(peak=peak))
        assert problem._peak_of_ours(bench_linear_policy_loss.ours, whole) == expected


def test_ligers_loss():
    """Of Liger's losses from hidden states, the one that runs on a CPU."""
    pytest.importorskip("liger_kernel")
    (case,) = (case for case in plan(TINY) if case.kind == "policy step")
    records = list(run_case(case, _session(*(peer for peer in PEERS if peer.name == "liger grpo"))))
    assert max(_by_name(records, "both")["liger grpo"].errors.values()) < 1e-5


def test_bytes_of_a_copy():
    """As many as the op has to move: that is the floor it is compared with."""
    from benchmarks.gpu.measure import _floor
    from benchmarks.problem import build

    for op, halves in (("logp", (1, 2)), ("delta_logp", (2, 3))):
        work = Workload(op, Shape("even", 16, 300), 10, "float32", training=True)
        copy = {c.name: c for c in _floor(Case("compare", work), build(work, CPU))}["copy"]
        assert [_copied(copy.forward), _copied(lambda copy=copy: copy.backward(None))] == list(halves)


def _copied(call) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return sum(event.count for event in profile.key_averages() if event.key == "aten::copy_")


def test_tile_configurations(monkeypatch):
    from contextlib import contextmanager
    from typing import NamedTuple

    class Config(NamedTuple):
        block_n: int
        num_warps: int

    used = []

    @contextmanager
    def use_config(config):
        used.append(config)
        yield

    configs = SimpleNamespace(candidates=lambda models, device: [Config(64 * models, 4)], use_config=use_config)
    monkeypatch.setitem(sys.modules, "dlogp_kernels.triton", SimpleNamespace(configs=configs))
    monkeypatch.setattr(backends, "unavailable", lambda *_: None)
    monkeypatch.setattr(backends, "use_backend", lambda _: use_config("triton"))
    monkeypatch.setattr(backends, "select", lambda *_: "triton")
    monkeypatch.setattr(backends, "launch", _launch_reference)
    records = list(run_case(_case("tune"), _session()))
    assert _by_name(records, "forward")["ours, block_n=64 num_warps=4"].median_ms > 0
    assert Config(64, 4) in used and "triton" in used
    run = _run([*records, *(r for r in records if r.candidate == "ours")], tiny=True)
    assert any("block_n=64 num_warps=4" in line for line in table.report(run).splitlines())


def _launch_reference(op, device, dtype, *arguments):
    from dlogp_kernels import blocked

    return getattr(blocked, op)(*arguments, 2**28)


def test_the_plan():
    cases = plan(REAL)
    labels = [case.label for case in cases]
    assert len(set(labels)) == len(labels)
    shapes = {(e.work.shape.d, e.work.shape.v) for e in cases if e.kind == "compare" and e.work.linear}
    assert shapes == {(896, 151936), (2048, 128256), (3584, 152064), (4096, 151936), (5120, 152064), (2304, 256000)}
    assert {e.work.n for e in cases if e.kind == "small"} == {1, 8, 64}
    sampled = {(e.work.n, e.work.variant) for e in cases if e.kind == "sample"}
    assert sampled == {(n, v) for n in (1, 8, 64, 128, 512) for v in ("top-p 0.7", "no truncation")}
    kinds = list(dict.fromkeys(case.kind for case in cases))
    assert kinds[kinds.index("sample") :][:4] == ["sample", "policy loss", "policy step", "peers"]
    assert REAL.policy_loss.n == 2**20 and REAL.policy_step.n == 8192 and REAL.policy_step.shape is REAL.head
    assert {e.work.dtype for e in cases} == {"bfloat16", "float16", "float32"}
    assert [case.kind for case in cases[:5]] == ["ceilings", *4 * ["compare"]]
    assert all(e.work.shape is REAL.head and e.work.n == 8192 for e in cases[1:7])
    assert len({(e.kind, e.work.op, e.work.training) for e in plan(TINY)}) > 15
    assert [case.kind for case in tuning_plan(REAL)] == ["ceilings", *4 * ["tune"]]


def test_peers_of_a_workload():
    def names(work: Workload) -> list[str]:
        return [peer.name for peer in peers_for(work, PEERS)]

    forward, training = REAL.main("linear_logp"), REAL.main("linear_logp", training=True)
    assert "quack" in names(forward) and "quack, sum" not in names(forward)
    assert "quack, sum" in names(training) and "quack" not in names(training)
    assert names(REAL.main("linear_delta_logp"))[0] == "trl, with kl"
    assert names(REAL.policy_step) == ["liger sm90, loss", "liger grpo"]
    # They are sent to the process that measures.
    assert [peer.name for peer in pickle.loads(pickle.dumps(PEERS))] == [peer.name for peer in PEERS]
    assert not any("sum" in name for name in names(REAL.main("linear_delta_logp", training=True)))
    assert "liger ce" in names(REAL.main("logp")) and "liger ce" not in names(REAL.main("logp", training=True))
    capped = Workload("linear_logp", Shape("capped", 16, 300, softcap=5.0), 24)
    reasons = {peer.name: peer.unavailable(capped, CPU) for peer in PEERS if not peer.modules}
    assert reasons == {}
    assert _peer(_right).unavailable(capped, CPU) == "it has no softcap"
    assert _peer(_right, hopper=True).unavailable(forward, CPU) == "its kernel is for compute capability 9.0"


def _entry(case: str, work: Workload, candidate: str, phase: str | None = None, **fields) -> Record:
    phase = phase or ("both" if work.training else "forward")
    fields = {"median_ms": 14.2, "tflops": 700.0, "gb_per_s": 4000.0, "peak_mib": 40.0, **fields}
    return record(case, work, candidate, phase, **fields)


def _run(records: list[Record], tiny: bool = False, **fields) -> Run:
    settings = {"mode": "gpu", "case": None, "only": None, "tiny": tiny, "tune": False}
    return Run({**environment(CPU), "device": "cuda", "gpu": {"driver_version": "580.1"}}, settings, records, **fields)


def _full_run() -> Run:
    """As after a run of everything, with a trouble in each case."""
    records = []
    for case in plan(REAL):
        training = case.work.training
        exact = {"logp": 2e-6, "entropy": 3e-6}
        ratios = {name: [1.05] * 3 for name in ("matmul", "copy", "ours", "ours, triton", "ours, one model", "eager")}
        names = ["ours", "ours, triton", "ours, gemm", "eager", "compiled", *dict.fromkeys(p.name for p in PEERS)]
        for phase in ("forward", "backward", "both") if training else ("forward",):
            for name in names:
                fields = {"ratios": ratios, "errors": exact, "host_us": 20.0}
                records.append(_entry(case.kind, case.work, name, phase, **fields))
        records.append(_entry("ceilings", case.work, "matmul"))
        records.append(_entry("ceilings", case.work, "copy"))
        records.append(
            _entry(case.kind, case.work, "ours, gemm", skipped=f"OutOfMemoryError: {case.label} {'x' * 200}")
        )
    half = _entry("half ignored", REAL.main("linear_logp"), "ours, half ignored", ratios={"ours": [0.52] * 3})
    counts = {"passed": 900, "failed": 60, "errors": 0, "skipped": 10, "seconds": 170.0}
    failures = [{"test": f"tests.test_x.test_{k}", "message": "y" * 300} for k in range(40)]
    tests = {**counts, "failures": failures, "incomplete": {"test_ops_memory.py": "stopped: out of time"}}
    return _run([*records, half], tests=tests)


def test_the_table_is_short():
    lines = table.report(_full_run()).splitlines()
    assert len(lines) <= table.MOST_LINES and all(len(line) <= 220 for line in lines)
    text = "\n".join(lines)
    for expected in ("900 passed, 60 failed", "stopped: out of time", "Without a figure:", "more: see `skipped`"):
        assert expected in text
    assert "| ours | 14.20 | 14.20 | 14.20 | 14.20 | 2e-06 | 3e-06 | 40 |" in text
    assert "| `linear_delta_logp` | triton 1.05 × | triton 1.05 × |" in text


def test_acceptance():
    lines = {line.what: line for line in table.acceptance(_full_run())}
    head = "`linear_logp` forward, bfloat16, N 8192, D 4096, V 151936"
    assert lines[head][1:] == ("≥ 0.92 of the bare GEMM's rate", "0.95 (14.20 ms, 700 TFLOP/s)", True)
    beside = lines["the same, beside Liger's SM90 kernel"]
    assert beside.measured == "1.05 × faster than liger sm90 (14.20 ms)" and beside.met is True
    assert lines["`logp` of given logits, backward"].met is True
    assert lines["log p and entropy against float64, bfloat16"].measured.startswith("3.0e-06")
    assert lines["peak memory over inputs, outputs, gradients: forward"].met is True
    assert lines["N 1, 8, 64: the host's time of one call"][2:] == ("20 µs (`linear_logp`, N 1)", True)
    assert lines["half the rows ignored"].met is True
    head = "`extrapolated_sample` bfloat16, V 151936, top-p 0.7, B 64…512"
    assert lines[head][1:] == ("≥ 0.75 of a copy's bandwidth, both rows read once", "0.95 (B 64, 4000 GB/s)", True)
    assert lines["the same, B 1"][1:] == ("≤ 25 µs", "14200 µs", False)
    beside = lines["one model's logits, top-p 0.7, beside FlashInfer, B 1…512"]
    assert beside.measured == "1.05 × faster, B 1" and beside.met is True
    head = "`linear_policy_loss` forward + backward, bfloat16, N 8192, D 4096, V 151936"
    assert lines[head][1:] == ("≥ 0.88 of the GEMM's rate for 6·N·V·D", "0.95 (14.20 ms, 700 TFLOP/s)", True)
    empty = table.acceptance(_run([]))
    assert {line.measured for line in empty} == {"not measured"} and {line.met for line in empty} == {None}


@pytest.mark.parametrize(
    ("matmul", "faster", "peak", "launches", "copy", "met"),
    [(1.1, 1.3, 900.0, 2, 1.2, True), (1.2, 1.2, 1100.0, 3, 1.3, False)],
)
def test_acceptance_of_the_policy_losses(matmul, faster, peak, launches, copy, met):
    step, loss = REAL.policy_step, REAL.policy_loss
    records = [
        _entry("policy step", step, "ours", peak_mib=peak, ratios={"matmul": [matmul] * 3}),
        _entry("policy step", step, "ours, triton", ratios={"ours": [1.0] * 3}),
        _entry("policy step", step, "liger grpo", ratios={"ours": [9.0] * 3}),
        _entry("policy step", step, "liger sm90, loss", ratios={"ours": [faster] * 3}),
        _entry("policy loss", loss, "ours", ratios={"copy": [copy] * 3}, statistics={"launches": launches}),
    ]
    run = _run(records)
    lines = [line for line in table.acceptance(run) if line.met is not None]
    assert [line.reach for line in lines] == [
        "≥ 0.88 of the GEMM's rate for 6·N·V·D",
        "≥ 1.25 × faster",
        "≤ 1024 MiB",
        "≤ 2 launches",
        "≥ 0.8 of a copy's bandwidth",
    ]
    assert [line.met for line in lines] == [met] * 5
    assert lines[1].measured == f"{faster:.2f} × faster than liger sm90, loss (14.20 ms)"
    assert lines[3].what.startswith("`policy_loss` of 1048576 tokens") and lines[3].measured == str(launches)


def test_the_table_of_a_readme(tmp_path, monkeypatch):
    begin, end = table.MARKERS
    readme = tmp_path / "README.md"
    readme.write_text(f"cpu\n{begin}\nold\n{end}\nafter\n")
    stored = _full_run().write(tmp_path)
    # A run on a GPU alone is given: the CPU's table, which this README has not, stays as it is.
    main(["readme", str(stored), "--readme", str(readme)])
    text = readme.read_text()
    assert "0.95 (14.20 ms, 700 TFLOP/s)" in text and "old" not in text and text.endswith(f"{end}\nafter\n")
    assert stored.name in text and "900 passed" in text
    assert "Not yet measured" in table.section(None)


def test_a_copy_without_git_names_its_commit(monkeypatch):
    monkeypatch.setattr("benchmarks.records._first_line", lambda *_: None)
    assert command._environment(CPU, "abc", ())["commit"] == "abc"


def test_it_needs_a_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="no CUDA device"):
        main(["gpu", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_a_run_is_json(tmp_path):
    path = _full_run().write(tmp_path)
    assert json.loads(path.read_text())["tests"]["passed"] == 900
