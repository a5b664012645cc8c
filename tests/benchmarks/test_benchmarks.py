"""The benchmarks measure what they say: times, memory, errors, tables."""

import dataclasses
import json
import subprocess
import sys
import time

import pytest
import torch
from paths import ROOT

from benchmarks import (
    bench_generate,
    bench_policy,
    bench_sampling,
    bench_statistics,
    cases,
    command,
    results,
    shapes,
)
from benchmarks.__main__ import main
from benchmarks.cases import BENCHES, MODES, compare, memory
from benchmarks.problem import build
from benchmarks.shapes import LONG_N, MAIN, MAIN_N, SWEEP_N, Shape, Workload, require_fit
from benchmarks.timing import (
    BASELINE,
    Budget,
    Candidate,
    Clock,
    NotMeasuredError,
    Sample,
    Timings,
    WrongResultError,
    absolute_error,
    measure,
    quantiles,
    verify,
)
from dlogp_kernels.demo.generate import PAIR_DIRECTORY

CPU = torch.device("cpu")
SMALL = Shape("small", 16, 300)
ONCE = Budget(seconds=0, least=1, most=1)


class _FakeClock(Clock):
    """A call takes as many seconds as it returns."""

    now = 0.0

    def _begun(self, call):
        self.now += call()
        return call, None


def test_a_ratio_of_known_costs():
    candidates = [Candidate("slow", lambda: 0.3, lambda _: 0.05), Candidate("fast", lambda: 0.1, lambda _: 0.1)]
    timings = measure(candidates, Budget(seconds=0), _FakeClock(CPU))
    assert timings.quantiles("slow", "forward").median == pytest.approx(0.3)
    ratios = {"forward": 3, "backward": 0.5, "both": 1.75}
    assert all(timings.ratio("slow", "fast", phase).median == pytest.approx(x) for phase, x in ratios.items())


def test_the_error_of_what_is_not_finite_or_of_another_shape():
    truth = torch.tensor([0.0, torch.inf, torch.nan], dtype=torch.float64)
    assert absolute_error(truth.float(), truth) == absolute_error(truth.float(), truth, scaled=True) == 0
    assert absolute_error(truth[:2].float(), truth) == torch.inf
    for wrong in ([0.0, -torch.inf, torch.nan], [0.0, torch.inf, 1.0], [torch.nan, torch.inf, torch.nan]):
        assert not absolute_error(torch.tensor(wrong), truth) < 1e30


def test_a_clock_waits_for_the_call():
    sample = Clock(CPU).sample(Candidate("slow", lambda: time.sleep(0.1), lambda _: time.sleep(0.2)), repeats=2)
    assert sample.forward >= 0.1 and sample.backward >= 0.2


def test_a_ratio_is_taken_within_a_round():
    """A machine that slows down threefold half way does not move the ratio of two candidates."""
    speed = [1, 1, 1, 3, 3]
    rounds = [{"ours": Sample(2.0 * s, 0), "other": Sample(1.0 * s, 0)} for s in speed]
    assert Timings(rounds).ratio("ours", "other", "forward") == (2, 2, 2)


def test_candidates_take_turns():
    """In an order of its own each round, so that none always comes after the same other one."""
    calls: list[str] = []
    candidates = [Candidate(name, lambda name=name: (calls.append(name), time.sleep(0.02))[0]) for name in "abc"]
    timings = measure(candidates, Budget(seconds=0, least=12, most=12), Clock(CPU))
    assert len(timings.rounds) == 12
    warm_up, *rounds = ("".join(calls[i : i + 3]) for i in range(0, len(calls), 3))
    assert warm_up == "abc" and len(rounds) == 12
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    for name in "abc":
        others = set("abc") - {name}
        assert {calls[i - 1] for i in range(4, len(calls)) if calls[i] == name} >= others


def test_rounds_keep_to_the_budget(monkeypatch):
    clock = _FakeClock(CPU)
    monkeypatch.setattr("benchmarks.timing.time.perf_counter", lambda: clock.now)
    candidates = [Candidate("a", lambda: 3.0), Candidate("b", lambda: 1.0)]
    # A round takes 4 s; a sixth would end after the budget.
    assert len(measure(candidates, Budget(seconds=21, least=2), clock).rounds) == 5
    assert len(measure(candidates, Budget(seconds=1, least=2), clock).rounds) == 2
    assert len(measure(candidates, Budget(seconds=100, most=7), clock).rounds) == 7


def test_quantiles():
    assert quantiles([5, 1, 4, 2, 3, 6]) == (3.5, 2, 5)


_ALLOCATE = """
import torch
from dlogp_kernels.demo.memory import peak_over

def warm():
    # What a warm-up leaves behind: blocks that glibc keeps.
    blocks = [torch.ones(2**14) for _ in range(1600)]

def allocate(temporary, small, output):
    torch.empty(temporary * 2**18)
    blocks = [torch.ones(2**14) for _ in range(small * 16)]
    del blocks
    return [torch.ones(output * 2**18)]

torch.ones(2**16).sum()
for sizes in {cases}:
    warm()
    peak = peak_over(lambda: allocate(*sizes), torch.device("cpu"))
    print(peak.extra / 2**20, peak.outputs / 2**20)
"""


def test_memory_of_known_allocations():
    peaks = {
        # (temporary, blocks of 64 KiB, output): peak over outputs, all in MiB.
        (200, 0, 40): 160,  # the temporary is not used, and gone before the output is there: it counts
        (0, 0, 100): 0,
        (150, 0, 300): 0,  # more than the heap has free, which would keep it
        (0, 80, 1): 80,  # such blocks come from the heap, which must not still be full of what ran before
    }
    script = _ALLOCATE.format(cases=list(peaks))
    child = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    for line, (sizes, peak) in zip(child.stdout.splitlines(), peaks.items(), strict=True):
        measured_peak, measured_output = map(float, line.split())
        assert measured_output == sizes[-1]
        assert measured_peak == pytest.approx(peak, abs=4)


def test_memory_in_a_fresh_process():
    work = Workload("logp", Shape("medium", 32, 20000), 400, "float32")
    logits = 400 * 20000 * 4 / 2**20
    (eager,) = memory(work, "eager", CPU)
    # log_softmax, its exponential and their product.
    assert eager["peak_mib"] == pytest.approx(3 * logits, abs=6)
    assert eager["output_mib"] == 2 * 400 * 4 / 2**20


def test_a_process_that_fails_is_reported():
    (row,) = memory(Workload("logp", SMALL, 4, "float32"), "nonsense", CPU)
    assert "StopIteration" in row["skipped"]


WORKS = [
    *(
        Workload(op, shape, 150, "float32", training)
        for op in bench_statistics.OPS
        for training in (False, True)
        for shape in (SMALL, Shape("capped", 16, 300, softcap=5.0))
    ),
    *(
        Workload("policy_loss", bench_policy.SHAPE, 200, "float32", training=True, variant=loss)
        for loss in bench_policy.LOSSES
    ),
    Workload("linear_policy_loss", Shape("tiny", 16, 500), 32, "float32", training=True),
    *(
        Workload(op, SMALL, 20, "float32", variant=variant)
        for op in ("extrapolated_sample", "linear_extrapolated_sample")
        for variant in bench_sampling.FILTERS
    ),
]


@pytest.mark.parametrize("work", WORKS, ids=str)
def test_every_candidate_is_right(work):
    bench = BENCHES[work.op]
    problem = bench.build(work, CPU)
    limits = None if "sample" in work.op else {"output": 1e-5, "gradient": 1e-5}
    for candidate in bench.candidates(problem):
        if candidate.name != "compiled" and candidate.check is not None:
            errors = candidate.check()
            outputs = {"logp", "entropy"} if work.op in bench_statistics.OPS else set()
            assert {*outputs, *(f"d_{name}" for name in problem.leaves)} <= errors.keys()
            verify(candidate.name, errors, limits or candidate.limits)
    floor = bench.floor(problem)
    if work.op == "linear_policy_loss":
        assert [candidate.name for candidate in floor] == ["matmul", "matmul, real"]
    for candidate in floor:
        Clock(CPU).sample(candidate)


@pytest.mark.parametrize("op", ["linear_logp", "linear_delta_logp"])
def test_a_wrong_candidate_is_refused(op):
    problem = build(Workload(op, SMALL, 50, "float32", training=True), CPU)
    eager = bench_statistics.EAGER[op]
    ours, *others = bench_statistics.candidates(problem)

    def off_by_a_bit(**inputs):
        stats = eager(**inputs)
        return stats._replace(entropy=stats.entropy + 2e-4)

    def half_the_gradient(**inputs):
        return type(eager(**inputs))(*(x / 2 + x.detach() / 2 for x in eager(**inputs)))

    def nan(**inputs):
        stats = eager(**inputs)
        return stats._replace(logp=stats.logp * float("nan"))

    for function, output in ((off_by_a_bit, "entropy"), (half_the_gradient, "d_hidden"), (nan, "logp")):
        with pytest.raises(WrongResultError, match=f"candidate: {output} is off by"):
            verify("candidate", problem.errors(function), ours.limits)
    assert ours.name == "ours" and all(other.limits == BASELINE for other in others)


def test_a_wrong_candidate_is_recorded_and_the_others_are_timed(monkeypatch):
    def wrong(**inputs):
        stats = bench_statistics.logp(**inputs)
        return stats._replace(logp=stats.logp + 1)

    monkeypatch.setattr("dlogp_kernels.logp", wrong)
    rows = list(compare(Workload("logp", SMALL, 20, "float32"), CPU, ONCE, ("ours", "eager")))
    assert [row["candidate"] for row in rows if row.get("wrong")] == ["ours"]
    assert "is off by" in rows[0]["skipped"]
    assert [row["candidate"] for row in rows if "ms" in row] == ["eager", "read"]


def test_what_does_not_fit_is_not_run():
    with pytest.raises(NotMeasuredError, match=r"needs about \d+\.\d GiB"):
        require_fit(Workload("linear_logp", MAIN, 10**9), "ours", CPU)


@pytest.mark.parametrize(("dtype", "slower"), [("bfloat16", 21), ("bfloat16", 19), ("float32", 21)])
def test_products_that_take_for_ever_are_not_run(monkeypatch, dtype, slower):
    """A CPU whose bfloat16 products take so many times as long as float32's."""
    monkeypatch.setattr(shapes, "_product_seconds", lambda of: 1.0 if of == torch.float32 else slower)
    monkeypatch.setattr(cases, "require_fit", lambda *_, **__: None)
    skipped = [
        row.get("skipped") for op in ("linear_logp", "linear_policy_loss")
        for row in compare(Workload(op, SMALL, 64, dtype, training=True), CPU, ONCE, ("ours",))
    ]  # fmt: skip
    if dtype == "bfloat16" and slower > 20:
        assert skipped == [f"torch's bfloat16 products are {slower} times slower than float32 on this CPU"] * 2
    else:
        assert not any(skipped)


@pytest.mark.parametrize("mode", MODES)
def test_what_a_mode_has(mode):
    labels = [label for op in BENCHES for label, _ in cases.cases(op, CPU, mode)]
    assert len(labels) == len(set(labels))
    assert any(f"N={LONG_N}" in label for label in labels) == (mode == "full")
    assert all(any(label.startswith(f"time: {op} ") for label in labels) for op in BENCHES)
    for op in (*bench_statistics.OPS, "policy_loss", "linear_policy_loss"):
        assert any(label.startswith(f"memory: {op} ") for label in labels), op
    swept = [label for label in labels if f"linear_logp {MAIN.name} N={SWEEP_N[-1]}" in label]
    assert len(swept) == (0 if mode == "quick" else 5)


@pytest.mark.parametrize("loss", bench_policy.LOSSES)
def test_a_wrong_policy_loss_is_refused(loss):
    work = Workload("policy_loss", bench_policy.SHAPE, 200, "float32", training=True, variant=loss)
    problem = bench_policy.as_others(bench_policy.build(work, CPU))
    wrong = problem.errors(lambda **inputs: bench_policy.Loss(2 * bench_policy.trl_loss(**inputs).loss))
    assert wrong["d_logp"] > 0.5


def test_a_wrong_way_of_sampling_is_refused(monkeypatch):
    draws = bench_sampling.build(Workload("extrapolated_sample", SMALL, 20, "float32", variant="top-p 0.7"), CPU)
    unfiltered = dataclasses.replace(draws, options={})
    with pytest.raises(WrongResultError, match="excluded token is off"):
        verify("eager", bench_sampling._excluded(bench_sampling.eager(unfiltered), draws), {"output": 0.0})
    ours = bench_sampling.ours
    monkeypatch.setattr(bench_sampling, "ours", lambda draws, options: ours(draws, options | {"threshold": 9.0}))
    with pytest.raises(WrongResultError, match=r"row \d+: selected is"):
        bench_sampling.candidates(draws)[0].check()


@pytest.fixture
def one_thread():
    """Threads of so small models mostly wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_decoding_beside_forwards_and_generate_calls(monkeypatch):
    monkeypatch.setattr(bench_generate, "_MAX_NEW_TOKENS", 5)
    rows = list(compare(dataclasses.replace(bench_generate.WORK, n=3), CPU, ONCE))
    assert [row["candidate"] for row in rows] == ["ours", *bench_generate.OTHERS]
    assert not any(row.get("skipped") for row in rows) and rows[0]["error_logp"] < 1e-3 and rows[0]["ms"] > 0


def _row(op: str, candidate: str, ms: float, over_ours: float | None = None, **changes: object) -> dict[str, object]:
    of = {"kind": "time", "op": op, "variant": "", "shape": MAIN.name, "n": MAIN_N, "d": MAIN.d, "v": MAIN.v}
    of |= {"dtype": "bfloat16", "training": False, "candidate": candidate, "phase": "forward"}
    return of | {"ms": ms, "p20_ms": ms, "p80_ms": ms, "over_ours": over_ours} | changes


def test_the_newest_measurement_of_a_case_stays(tmp_path):
    path = tmp_path / "cpu.csv"
    older = [_row("linear_logp", "ours", 300.0, 1.0), _row("linear_logp", "eager", 900.0, 3.0)]
    results.write(results.merged(None, older), path)
    newer = [_row("linear_logp", "ours", 200.0, 1.0), _row("linear_logp", "ours", 50.0, 1.0, n=64)]
    results.write(results.merged(results.read(path), newer), path)
    assert list(results.read(path).ms) == [900.0, 200.0, 50.0]
    assert [file.name for file in tmp_path.iterdir()] == ["cpu.csv"]


def test_the_table_of_a_readme(tmp_path):
    rows = [
        _row("linear_logp", "ours", 164.0, 1.0),
        _row("linear_logp", "eager", 590.0, 3.6),
        _row("linear_logp", "matmul", 158.0, 0.96),
        _row("linear_logp", "eager", 9.0, 9.0, n=64),
        _row("linear_logp", "ours", 700.0, 1.0, training=True, phase="both"),
        _row("linear_logp", "ours", 300.0, 1.0, training=True, phase="forward"),
    ]
    path, readme = tmp_path / "cpu.csv", tmp_path / "README.md"
    results.write(results.merged(None, rows), path)
    begin, end = results.MARKERS
    readme.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    for _ in range(2):
        main(["readme", str(path), "--readme", str(readme)])
        lines = readme.read_text().splitlines()
        assert lines[:2] == ["before", begin] and lines[-2:] == [end, "after"] and "old" not in lines
        assert lines[4:-2] == [
            "| `linear_logp`, N 512, bf16 | 164 ms | the bare products 0.96 ×, eager 3.60 × |",
            "| … with a backward pass | 700 ms |  |",
        ]
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="benchmark table"):
        results.put_into(readme, "text")


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.plot import draw

    where = {"machine": "a machine", "threads": 2, "torch": "2.13", "date": "2026-11-23"}
    rows = [
        _row("linear_logp", name, 1.0, scale, n=n, kind=kind, peak_mib=n * scale, **where)
        for name, scale in (("ours", 1.0), ("eager", 3.0), ("matmul", 0.9))
        for kind in ("time", "memory")
        for n in (16, 64)
    ]
    draw(results.merged(None, rows), tmp_path / "over_n.png")
    assert (tmp_path / "over_n.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no sweep"):
        draw(results.merged(None, [_row("logp", "ours", 1.0)]), tmp_path / "empty.png")


def test_a_run_from_its_arguments_to_its_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cases, "MAIN", SMALL)
    main(["--quick", "--only=extrapolated_sample", "--out", str(tmp_path)])
    (row,) = [row for row in results.read(tmp_path / "cpu.csv").to_dict("records") if row["candidate"] == "ours"]
    assert row["op"] == "extrapolated_sample" and row["over_ours"] == 1 and row["backend"] in ("cpu", "reference")
    assert row["threads"] == torch.get_num_threads() and row["torch"] == torch.__version__ and row["commit"]
    assert row["machine"] and row["cpu"] == torch.backends.cpu.get_cpu_capability()
    everything = (tmp_path / "cpu_environment.txt").read_text()
    assert "PyTorch version" in everything and str(ROOT) not in everything
    assert "| `extrapolated_sample` top-p 0.7 float32 | 8, 300 | ours | forward |" in capsys.readouterr().out


def test_a_shape_of_your_own(capsys):
    main(["shape", "--op", "linear_logp", "--n", "40", "--d", "16", "--v", "300", "--dtype", "fp32", "--seconds", "0"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 4 + 3  # eager, compiled and a product beside ours; memory of three
    assert all("| `linear_logp` float32 | 40, 300 |" in line for line in lines[2:])
    with pytest.raises(SystemExit, match="give --d and --v"):
        main(["shape", "--v", "300"])


def test_the_shape_of_a_model():
    model = str(PAIR_DIRECTORY / "rl")
    options = command._parser().parse_args(["shape", "--model", model, "--v", "300"])
    config = json.loads((PAIR_DIRECTORY / "rl" / "config.json").read_text())
    assert command._shape_of(options) == Shape("yours", config["hidden_size"], 300)
