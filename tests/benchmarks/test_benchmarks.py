"""The benchmarks measure what they say: times, memory, errors, the table."""

import dataclasses
import json
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from paths import ROOT

from benchmarks import (
    bench_extrapolated_sample,
    bench_generate,
    bench_linear_policy_loss,
    bench_policy_loss,
    frequencies,
    memory,
    policy,
    sampling,
    shapes,
    table,
)
from benchmarks.__main__ import main
from benchmarks.bench import tolerances
from benchmarks.case import MODES
from benchmarks.cases import Planner
from benchmarks.harness import (
    Budget,
    Candidate,
    Clock,
    NotMeasuredError,
    Sample,
    Timings,
    WrongResultError,
    measure,
    quantiles,
    verify,
)
from benchmarks.memory import Answer, NoAnswerError, Request, in_fresh_process
from benchmarks.plans import PLANS
from benchmarks.problem import Truth, build
from benchmarks.records import Record, Run, environment, read, record, time_fields
from benchmarks.registry import BENCHES
from benchmarks.shapes import LONG_N, MAIN, MAIN_N, Shape, Workload, require_fit

CPU = torch.device("cpu")
SMALL = Shape("small", 16, 300)


def _sleeper(name: str, forward: float, backward: float | None = None) -> Candidate:
    step = None if backward is None else lambda _: time.sleep(backward)
    return Candidate(name, lambda: time.sleep(forward), step)


def test_a_ratio_of_known_costs():
    # A machine that is busy wakes a sleeper late: sleeps are long, and tolerances below what a mistake would make.
    timings = measure([_sleeper("slow", 0.15, 0.05), _sleeper("fast", 0.05, 0.1)], Budget(seconds=1), Clock(CPU))
    assert timings.quantiles("slow", "forward").median == pytest.approx(0.15, rel=0.25)
    assert timings.ratio("slow", "fast", "forward").median == pytest.approx(3, rel=0.25)
    assert timings.ratio("slow", "fast", "backward").median == pytest.approx(0.5, rel=0.25)
    assert timings.ratio("slow", "fast", "both").median == pytest.approx(4 / 3, rel=0.2)


def test_a_ratio_is_taken_within_a_round():
    """A machine that slows down threefold half way does not move the ratio of two candidates."""
    speed = [1, 1, 1, 3, 3]
    rounds = [{"ours": Sample(2.0 * s, 0), "other": Sample(1.0 * s, 0)} for s in speed]
    assert Timings(rounds).ratio("ours", "other", "forward") == (2, 2, 2)


def test_candidates_take_turns():
    calls: list[str] = []
    candidates = [Candidate(name, lambda name=name: (calls.append(name), time.sleep(0.02))[0]) for name in "abc"]
    timings = measure(candidates, Budget(seconds=0, least=3, most=3), Clock(CPU))
    assert len(timings.rounds) == 3
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"


class _FakeClock(Clock):
    """A call takes as many seconds as it returns."""

    def seconds(self, call):
        self.now = getattr(self, "now", 0.0) + call()
        return call(), None


def test_rounds_keep_to_the_budget(monkeypatch):
    clock = _FakeClock(CPU)
    monkeypatch.setattr("benchmarks.harness.time.perf_counter", lambda: clock.now)
    candidates = [Candidate("a", lambda: 3.0), Candidate("b", lambda: 1.0)]
    # A round takes 4 s; a sixth would end after the budget.
    assert len(measure(candidates, Budget(seconds=21, least=2), clock).rounds) == 5
    assert len(measure(candidates, Budget(seconds=1, least=2), clock).rounds) == 2
    assert len(measure(candidates, Budget(seconds=100, most=7), clock).rounds) == 7


def test_quantiles():
    assert quantiles([5, 1, 4, 2, 3, 6]) == (3.5, 2, 5)


_ALLOCATE = """
import torch
from benchmarks.memory import peak_over

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
    answer = peak_over(lambda: allocate(*sizes), torch.device("cpu"))
    print(answer.peak / 2**20, answer.outputs / 2**20)
"""


def test_memory_of_known_allocations():
    peaks = {
        # (temporary, blocks of 64 KiB, output): peak over outputs, all in MiB.
        (200, 0, 40): 160,  # the temporary is not used, and gone before the output is there: it counts
        (0, 0, 100): 0,
        (100, 0, 300): 0,
        (0, 80, 1): 80,  # such blocks come from the heap, which must not still be full of what ran before
    }
    script = _ALLOCATE.format(cases=list(peaks))
    child = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    for line, (sizes, peak) in zip(child.stdout.splitlines(), peaks.items(), strict=True):
        measured_peak, measured_output = map(float, line.split())
        assert measured_output == sizes[-1]
        assert measured_peak == pytest.approx(peak, abs=4)


def test_memory_in_a_fresh_process():
    shape = Shape("medium", 32, 20000)
    work = Workload("logp", shape, 400, "float32")
    logits = 400 * 20000 * 4 / 2**20
    eager = in_fresh_process(Request(work, "eager", check=True))
    # log_softmax, its exponential and their product.
    assert eager.peak / 2**20 == pytest.approx(3 * logits, abs=6)
    assert eager.outputs == 2 * 400 * 4
    assert eager.errors["logp"] < 1e-4
    assert eager.seconds > 0


def test_a_process_that_fails_is_reported():
    with pytest.raises(NoAnswerError, match=r"exit status 1: .*nonsense"):
        in_fresh_process(Request(Workload("logp", SMALL, 4, "float32"), "nonsense"))


@pytest.mark.parametrize("op", BENCHES)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [SMALL, Shape("capped", 16, 300, softcap=5.0)])
def test_every_candidate_is_right(op, training, shape):
    work = Workload(op, shape, 50, "float32", training)
    problem = build(work, CPU)
    truth = Truth(problem)
    gradients = {f"d_{name}" for name in problem.leaves} if training else set()
    for name in ("ours", "eager", "chunked"):
        errors = truth.errors(BENCHES[op].function(name))
        assert {"logp", "entropy", *gradients} <= errors.keys()
        verify(name, errors, dict.fromkeys(errors, 1e-5))
    for candidate in BENCHES[op].floor(problem):
        Clock(CPU).sample(candidate)


@pytest.mark.parametrize("op", ["linear_logp", "linear_delta_logp"])
def test_a_wrong_candidate_is_refused(op):
    work = Workload(op, SMALL, 50, "float32", training=True)
    bench = BENCHES[op]
    truth = Truth(build(work, CPU))

    def off_by_a_bit(**inputs):
        stats = bench.eager(**inputs)
        return stats._replace(entropy=stats.entropy + 2e-4)

    def half_the_gradient(**inputs):
        return type(bench.eager(**inputs))(*(x / 2 + x.detach() / 2 for x in bench.eager(**inputs)))

    def nan(**inputs):
        stats = bench.eager(**inputs)
        return stats._replace(logp=stats.logp * float("nan"))

    for function, output in ((off_by_a_bit, "entropy"), (half_the_gradient, "d_hidden"), (nan, "logp")):
        errors = truth.errors(function)
        with pytest.raises(WrongResultError, match=f"candidate: {output} is off by"):
            verify("candidate", errors, tolerances("ours", errors))


def test_a_wrong_candidate_is_recorded_and_the_others_are_timed():
    bench = dataclasses.replace(BENCHES["logp"], ours=lambda logits, target: _wrong(logits, target))
    planner = Planner(bench, CPU, "quick")
    work = Workload("logp", SMALL, 20, "float32")
    records = list(planner._comparison("compare", work, ("ours", "eager")))
    skipped = {entry.candidate: entry.skipped for entry in records}
    assert [entry.candidate for entry in records if entry.wrong] == ["ours"]
    assert "is off by" in skipped["ours"]
    assert skipped["eager"] is None and skipped["read"] is None


def _wrong(logits, target):
    stats = BENCHES["logp"].eager(logits, target)
    return stats._replace(logp=stats.logp + 1)


def test_what_does_not_fit_is_not_run():
    with pytest.raises(NotMeasuredError, match=r"needs about \d+\.\d GiB"):
        require_fit(Workload("linear_logp", MAIN, 10**9), "ours", CPU)


def _require_products(monkeypatch: pytest.MonkeyPatch, dtype: str, slower: float) -> None:
    """On a CPU whose bfloat16 products take `slower` times as long as float32's."""
    seconds = {torch.float32: 1.0, torch.bfloat16: slower}
    monkeypatch.setattr(shapes, "_product_seconds", lambda left, right: seconds[left.dtype])
    shapes.require_products(Workload("linear_logp", MAIN, MAIN_N, dtype, training=True), CPU)


def test_products_that_take_for_ever_are_not_run(monkeypatch):
    with pytest.raises(NotMeasuredError, match="bfloat16 products are 21 times slower than float32"):
        _require_products(monkeypatch, "bfloat16", 21)
    _require_products(monkeypatch, "bfloat16", 19)
    _require_products(monkeypatch, "float32", 21)


@pytest.mark.parametrize("op", ["linear_logp", "linear_policy_loss"])
def test_such_products_are_a_reason(monkeypatch, op):
    monkeypatch.setattr(shapes, "_product_seconds", lambda left, _: 1.0 if left.dtype == torch.float32 else 99.0)
    monkeypatch.setattr(shapes, "available_bytes", lambda device: 2**50)
    cases = PLANS[op](CPU, "default")
    slow = [case for case in cases if case.label.startswith("compare") and "bfloat16 forward+backward" in case.label]
    assert slow
    for case in slow:
        assert [entry.skipped for entry in case.run()] == [
            "torch's bfloat16 products are 99 times slower than float32 on this CPU"
        ]


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_has_what_the_table_needs(mode):
    labels = [case.label for plan in PLANS.values() for case in plan(CPU, mode)]
    assert len(labels) == len(set(labels)) or mode != "quick"
    assert any(f"N={LONG_N}" in label for label in labels) == (mode == "full")
    assert any(label.startswith("frequencies") for label in labels) == (mode == "full")
    ops = ("linear_logp", "delta_logp", "extrapolated_sample", "hf.generate", "policy_loss", "linear_policy_loss")
    kinds = [f"compare: {op}" for op in ops]
    for kind in (*kinds, "memory", "linearity", "half ignored", "memory: policy_loss", "workspace"):
        assert any(label.startswith(kind) for label in labels), kind


def _entry(op: str, candidate: str = "ours", case: str = "compare", n: int = MAIN_N, **fields: object) -> Record:
    training = bool(fields.pop("training", False))
    dtype = str(fields.pop("dtype", "bfloat16" if op.startswith("linear") else "float32"))
    work = Workload(op, MAIN, n, dtype, training)
    return record(case, work, candidate, "both" if training else "forward", backend="cpu", **fields)


def _records() -> list[Record]:
    return [
        _entry(
            "linear_logp", median_ms=350, ratios={"matmul": [0.96, 0.9, 1], "eager": [0.4] * 3}, errors={"logp": 2e-6}
        ),
        _entry("linear_logp", training=True, median_ms=2000, ratios={"matmul": [1.3] * 3}),
        _entry("logp", median_ms=20, ratios={"eager": [0.1] * 3}),
        _entry("linear_logp", case="memory", peak_mib=20.0),
        _entry("linear_delta_logp", case="memory", n=2048, peak_mib=65.0),
        _entry("logp", case="memory", training=True, peak_mib=100.0),
        _entry("logp", "eager", case="sweep memory", peak_mib=5000.0),
        _entry("linear_delta_logp", "ours, N=2048", "linearity", 2048, ratios={"ours, N=4096": [0.5] * 3}),
        _entry("linear_delta_logp", "ours, N=4096", "linearity", 4096, ratios={"ours, N=2048": [2.06] * 3}),
        _entry("logp", "ours, half ignored", "half ignored", ratios={"ours": [0.52] * 3}),
        _sampled(
            "compare", n=8, variant="top-p 0.7", median_ms=4.2, ratios={"warpers": [0.05] * 3, "numpy": [0.04] * 3}
        ),
        # Another filter is not what the table is of.
        _sampled("compare", n=8, variant="top-k 50", median_ms=1.0, ratios={"warpers": [0.9] * 3, "numpy": [0.9] * 3}),
        _sampled("frequencies", statistics={"p, seed 1": 0.5, "p, seed 2": 2e-3, "p, seed 3": 0.97}),
        _sampled("tail", statistics={"drawn": 1080.0, "expected": 1000.0}),
        _decoded(ratios={"generate calls": [0.125] * 3, "forwards": [1.2] * 3}, tokens_per_s=4321.0),
        _policy("compare", median_ms=1.5, ratios={"TRL": [0.2] * 3, "TRL with metrics": [0.1] * 3}),
        _policy("compare", "SAPO", median_ms=1.5, ratios={"TRL": [0.9] * 3}),
        _policy("memory", statistics={"tensors": 2.01}),
        _entry("linear_policy_loss", training=True, median_ms=900, ratios={"matmul": [1.2] * 3, "eager": [0.25] * 3}),
        _entry(
            "linear_policy_loss", training=True, dtype="float32",
            median_ms=3000, ratios={"matmul": [1.1] * 3, "eager": [0.8] * 3},
        ),
        _entry(
            "linear_policy_loss", case="workspace", training=True,
            statistics={"MiB": 100.0, "MiB of float32 logits": 297.0},
        ),
    ]  # fmt: skip


def _sampled(case: str, n: int = 10**6, variant: str = "", **fields: object) -> Record:
    work = Workload("extrapolated_sample", MAIN, n, "float32", variant=variant)
    return record(case, work, "ours", "forward", backend="cpu", **fields)


def _policy(case: str, variant: str = "DAPO", **fields: object) -> Record:
    n = bench_policy_loss.SEQUENCES * bench_policy_loss.TOKENS
    work = Workload("policy_loss", bench_policy_loss.SHAPE, n, "float32", training=True, variant=variant)
    return record(case, work, "ours", "both", backend="cpu", **fields)


def _decoded(**fields: object) -> Record:
    work = Workload("hf.generate", Shape("demo pair", 0, 30), 64, "float32")
    return record("compare", work, "ours", "forward", median_ms=500.0, **fields)


def test_the_table():
    by_what = {line.what: line for line in table.lines(_records())}
    head = f"`linear_logp` bf16, N {MAIN_N}, D {MAIN.d}, V {MAIN.v}"
    assert by_what[head][1:] == ("≤ 1.05 × a bare bf16 matmul", "0.96 × (350 ms)", True)
    assert by_what["the same"][2:] == ("2.5 × (350 ms)", True)
    assert by_what["the same: log p against float64"][2:] == ("2.0e-06", True)
    assert by_what["`linear_logp` forward + backward (hidden, weight), bf16"].met is False
    assert by_what[f"`logp` of fp32 logits [{MAIN_N}, {MAIN.v}]"][2:] == ("10.0 × (20 ms)", True)
    assert by_what["`delta_logp` of two such tensors"][2:] == ("not measured", None)
    forward = by_what["peak memory over inputs and outputs, forward"]
    assert forward.measured.startswith("65 MiB") and "N 2048" in forward.measured and forward.met is False
    assert by_what["the same, forward + backward"].met is True
    assert by_what["`linear_delta_logp`: time over N"].measured == "+3.0 % (N 2048, 4096)"
    assert by_what["half the rows ignored"][2:] == ("0.52 × `logp`", True)


def test_the_lines_of_sampling_and_decoding():
    by_reach = {line.reach: line[2:] for line in table.lines(_records())}
    warpers = "≥ 15 × faster than `transformers`' warpers + multinomial on the extrapolated logits"
    assert by_reach[warpers] == ("20.0 × (4.2 ms)", True)
    numpy = "≥ 30 × faster than the authors' loop over all log-probabilities, in numpy"
    assert by_reach[numpy] == ("25.0 × (4.2 ms)", False)
    assert by_reach["p > 1e-04 for 3 seeds"] == ("p = 0.5, 0.002, 0.97", True)
    assert by_reach["as many as expected, within 4.5 σ"] == ("1080 drawn, 1000 expected", True)
    calls = "≥ 5 × the tokens/s of two `model.generate(max_new_tokens=1)` calls a step"
    assert by_reach[calls] == ("8.0 × (4,321 tokens/s)", True)
    assert by_reach["≤ 1.25 × the two models' forwards alone"] == ("1.20 × (500 ms)", True)
    bad = [
        _sampled("frequencies", statistics={"p, seed 1": 0.5, "p, seed 2": 1e-5}),
        _sampled("tail", statistics={"drawn": 0.0, "expected": 33.0}),
    ]
    assert [line.met for line in table.lines(bad) if line.measured != "not measured"] == [False, False]


def test_the_lines_of_the_policy_losses():
    lines = table.lines(_records())
    by_reach, by_what = {line.reach: line[2:] for line in lines}, {line.what: line[2:] for line in lines}
    assert by_reach["≥ 4 × faster than eager, as TRL writes it"] == ("5.0 × (1.5 ms)", True)
    assert by_reach["≤ 2 tensors of B·T"] == ("2.01", False)
    barely = table.lines([_policy("memory", statistics={"tensors": 2.004})])
    assert [line[2:] for line in barely if line.met is not None] == [("2.00", False)]
    assert by_reach["≤ 1.15 × three bare bf16 matmuls of N·V·D"] == ("1.20 × (900 ms)", False)
    assert by_reach["≤ 1.15 × three bare fp32 matmuls of N·V·D"] == ("1.10 × (3000 ms)", True)
    assert by_what["`linear_policy_loss` bf16, the same"] == ("4.0 × (900 ms)", True)
    assert by_what["`linear_policy_loss` fp32, the same"] == ("1.2 × (3000 ms)", False)
    memory_reach = "≤ 256 MiB, no N×V buffer: less than half the float32 logits"
    assert by_reach[memory_reach] == ("100 MiB", True)
    too_much = _entry(
        "linear_policy_loss", case="workspace", training=True,
        statistics={"MiB": 150.0, "MiB of float32 logits": 297.0},
    )  # fmt: skip
    assert {line.reach: line[2:] for line in table.lines([too_much])}[memory_reach] == ("150 MiB", False)


@pytest.mark.parametrize("loss", bench_policy_loss.LOSSES, ids=lambda loss: loss.label)
def test_the_policy_loss_beside_trls(loss):
    batch = policy.build(4, 50, CPU)
    for function in (policy.trl_loss, partial(bench_policy_loss.ours, reweight="none")):
        assert max(bench_policy_loss.errors_of(function, batch, loss).values()) <= 1e-5
    wrong = bench_policy_loss.errors_of(lambda *inputs: 2 * policy.trl_loss(*inputs), batch, loss)
    assert wrong["d_logp"] > 0.5


def test_the_linear_policy_loss_beside_eager():
    step = bench_linear_policy_loss.build(Workload("linear_policy_loss", Shape("tiny", 16, 500), 32, "float32"), CPU)
    for function in (bench_linear_policy_loss.eager, partial(bench_linear_policy_loss.ours, reweight="none")):
        assert max(bench_linear_policy_loss.errors_of(function, step).values()) <= 1e-5
    names = [candidate.name for candidate in bench_linear_policy_loss.bare_products(step)]
    for candidate in bench_linear_policy_loss.bare_products(step):
        candidate.backward(candidate.forward())
    assert names == ["matmul", "matmul, real"]


def test_an_answer_of_a_fresh_process():
    tensor = 4 * 16 * bench_policy_loss.SEQUENCES * bench_policy_loss.TOKENS
    assert 2 * tensor <= memory.in_process_of("benchmarks.bench_policy_loss", "ours")["peak"] <= 2.1 * tensor
    with pytest.raises(NoAnswerError, match="KeyError: 'theirs'"):
        memory.in_process_of("benchmarks.bench_policy_loss", "theirs")


def test_a_readme_keeps_what_a_newer_run_has_not(tmp_path):
    """An older run without the columns of today, and a newer one of one op."""
    older = Run(environment(CPU), {"mode": "quick", "only": None, "case": None}, _records()[:3])
    drawn = [entry for entry in _records() if entry.op in ("extrapolated_sample", "hf.generate")]
    newer = Run(environment(CPU), {"mode": "default", "only": ["extrapolated_sample"], "case": None}, drawn)
    paths = [older.write(tmp_path), newer.write(tmp_path)]
    content = json.loads(paths[0].read_text())
    for entry in content["records"]:
        for name in ("variant", "tokens_per_s", "statistics"):
            del entry[name]
    paths[0].write_text(json.dumps(content))
    readme = tmp_path / "README.md"
    readme.write_text("\n".join(table.MARKERS))
    main(["readme", *map(str, paths), "--readme", str(readme)])
    text = readme.read_text()
    assert "0.96 × (350 ms)" in text and "p = 0.5, 0.002, 0.97" in text and "4,321 tokens/s" in text
    assert older.name in text and newer.name in text


def test_the_table_of_a_readme(tmp_path):
    run = Run(environment(CPU), {"mode": "quick", "only": None, "case": None}, _records())
    stored = read(run.write(tmp_path))
    assert stored.records == run.records and stored.environment == run.environment
    begin, end = table.MARKERS
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    for _ in range(2):
        table.put_into(readme, table.section([stored]))
        text = readme.read_text()
        assert text.startswith(f"before\n{begin}\n| what | reach | measured | met? |\n|---|---|---|---|\n")
        assert text.endswith(f"{end}\nafter\n") and "old" not in text
        assert f"torch {torch.__version__}" in text and run.name in text
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="benchmark table"):
        table.put_into(readme, "text")


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.plot import draw

    records = [
        _entry("linear_logp", name, case, n, peak_mib=n * scale, ratios={"matmul": [scale] * 3})
        for name, scale in (("ours", 1.0), ("eager", 3.0))
        for case in ("sweep", "sweep memory")
        for n in (16, 64)
    ]
    run = Run(environment(CPU), {"mode": "default", "only": None, "case": None}, records)
    draw([run], tmp_path / "over_n.png")
    assert (tmp_path / "over_n.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no sweep"):
        draw([dataclasses.replace(run, records=[])], tmp_path / "empty.png")


def test_a_run_keeps_what_it_had(tmp_path):
    run = Run(environment(CPU), {"mode": "quick", "only": None, "case": None})
    run.records.append(_records()[0])
    path = run.write(tmp_path)
    run.records.append(_records()[1])
    assert run.write(tmp_path) == path
    assert len(json.loads(path.read_text())["records"]) == 2
    header, *rows = path.with_suffix(".csv").read_text().splitlines()
    assert "time_over_matmul" in header and "error_logp" in header and len(rows) == 2
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".csv", ".json"]


def test_time_fields():
    timings = Timings([{"a": Sample(0.001, 0.002), "b": Sample(0.002, 0.002)}] * 3)
    fields = time_fields(timings, "a", ["a", "b"], "both")
    assert fields["median_ms"] == pytest.approx(3) and fields["rounds"] == 3
    assert fields["ratios"] == {"b": pytest.approx([0.75] * 3)}


@pytest.mark.parametrize("variant", sampling.FILTERS)
def test_every_way_of_sampling_is_right(variant):
    draws = sampling.build(Workload("extrapolated_sample", SMALL, 20, "float32", variant=variant), CPU)
    ways = (sampling.ours, sampling.ours_all_replaced, sampling.ours_one_model)
    for draw in (*ways, sampling.eager, sampling.eager_one_model, sampling.warpers, sampling.in_numpy):
        verify(draw.__name__, sampling.errors_of(draw, draws), sampling.TOLERANCES)


def test_a_wrong_way_of_sampling_is_refused(monkeypatch):
    draws = sampling.build(Workload("extrapolated_sample", SMALL, 20, "float32", variant="top-p 0.7"), CPU)
    unfiltered = dataclasses.replace(draws, work=dataclasses.replace(draws.work, variant="no truncation"))
    with pytest.raises(WrongResultError, match="excluded token is off"):
        verify("eager", sampling.errors_of(lambda _: sampling.eager(unfiltered), draws), sampling.TOLERANCES)
    monkeypatch.setitem(sampling._OPTIONS, sampling.ours, sampling._OPTIONS[sampling.ours_all_replaced])
    with pytest.raises(WrongResultError, match=r"ours: .*is off"):
        verify("ours", sampling.errors_of(sampling.ours, draws), sampling.TOLERANCES)


def _multinomial(logits, seed, step, power=1.0):
    generator = torch.Generator().manual_seed(seed + step)
    return [torch.multinomial((power * logits[0]).softmax(-1), len(logits), True, generator=generator)]


def test_frequencies_see_a_wrong_distribution():
    for power, right in ((1.0, True), (1.05, False)):
        draw = partial(_multinomial, power=power)
        assert (frequencies.p_value(draw, 3000, 50_000, 1, CPU) > 1e-4) == right
    found = frequencies.tail(_multinomial, 1e-4, 1000, 5000, 4, 1, CPU)
    assert found.expected == 2000 and abs(found.tokens.numel() - 2000) < 4.5 * 2000**0.5


def test_the_cases_of_sampling_and_decoding(tmp_path, monkeypatch):
    """From the arguments to the records, small."""
    for name, value in {
        "MAIN": SMALL,
        "DRAWS": 3000,
        "TAIL": Shape("tail", 0, 51),
        "RARE": 1e-2,
        "_TAIL_ROWS": 500,
    }.items():
        monkeypatch.setattr(bench_extrapolated_sample, name, value)
    monkeypatch.setattr(bench_generate, "PROBLEMS", 3)
    monkeypatch.setattr(bench_generate, "_MAX_NEW_TOKENS", 5)
    monkeypatch.setitem(bench_generate._ROUNDS, "full", 1)
    monkeypatch.setattr(bench_extrapolated_sample, "budget", lambda _: Budget(seconds=0, least=1))
    threads = torch.get_num_threads()
    main(["--full", "--only=extrapolated_sample", "--only=hf.generate", "--out", str(tmp_path), "--threads=1"])
    torch.set_num_threads(threads)
    (path,) = tmp_path.glob("*.json")
    records = read(path).records
    assert not any(entry.skipped for entry in records)
    compared = {entry.candidate for entry in records if entry.case == "compare" and entry.op == "extrapolated_sample"}
    assert compared == {"ours", "ours, all replaced", "eager", "warpers", "numpy"}
    assert {entry.variant for entry in records if entry.case == "compare"} == {*sampling.FILTERS, ""}
    (counted,) = [entry for entry in records if entry.case == "frequencies"]
    assert len(counted.statistics) == 3 and min(counted.statistics.values()) > 1e-4
    (tail,) = [entry for entry in records if entry.case == "tail"]
    assert tail.statistics["expected"] == 1500 and abs(tail.statistics["drawn"] - 1500) < 175
    decoded = {entry.candidate: entry for entry in records if entry.op == "hf.generate"}
    assert decoded["ours"].tokens_per_s > 0 and max(decoded["ours"].errors.values()) < 1e-3
    assert decoded["ours"].ratios.keys() == {"forwards", "generate calls", "generate calls, caches kept"}


def test_environment_says_where_a_figure_comes_from():
    env = environment(CPU)
    assert env["machine"] and env["cores"] and env["threads"] == torch.get_num_threads()
    assert env["versions"]["torch"] == torch.__version__
    assert env["backends"]["linear_logp_fwd on cpu"] in ("cpu", "reference")
    assert str(ROOT) not in json.dumps(env)


def test_answer_is_json():
    answer = Answer(peak=1, outputs=2, seconds=0.5, errors={"logp": 1e-6})
    assert Answer(**json.loads(json.dumps(dataclasses.asdict(answer)))) == answer
