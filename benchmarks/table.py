"""The acceptance table, computed from records, and its place in a README."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import bench_extrapolated_sample as sample
from . import bench_generate as decode
from . import bench_linear_policy_loss as linear_policy
from . import bench_policy_loss as policy
from .records import Record, Run
from .shapes import LONG_N, MAIN, MAIN_N

MARKERS = ("<!-- benchmark table -->", "<!-- /benchmark table -->")

FORWARD_MIB, BACKWARD_MIB = 64, 256
#: Of B · T float32 numbers: the gradient, and what the forward pass leaves for it.
MOST_TENSORS = 2
#: Of a chi-square, at least; and how many standard deviations the number of tokens from the tail may be off.
LEAST_P, MOST_SIGMAS = 1e-4, 4.5
_NOT_MEASURED = "not measured"


class Line(NamedTuple):
    """`met` is None where nothing was measured."""

    what: str
    reach: str
    measured: str
    met: bool | None


def lines(records: Sequence[Record]) -> list[Line]:
    """The table's lines, from the records of one run or of several."""
    head = f"bf16, N {MAIN_N}, D {MAIN.d}, V {MAIN.v}"
    given = f"fp32 logits [{MAIN_N}, {MAIN.v}]"
    single, pair = _main(records, "linear_logp"), _main(records, "linear_delta_logp")
    step = _main(records, "linear_logp", training=True)
    logp, delta_logp = _main(records, "logp"), _main(records, "delta_logp")
    return [
        _slower(f"`linear_logp` {head}", single, "matmul", "a bare bf16 matmul", 1.05),
        _faster("the same", single, "eager", "eager PyTorch", 2),
        _exact("the same: log p against float64", single, 1e-5),
        _slower("`linear_delta_logp`, same shape", pair, "matmul", "two bare matmuls", 1.05),
        _slower(
            "`linear_logp` forward + backward (hidden, weight), bf16",
            step,
            "matmul",
            "four bare matmuls of N·V·D",
            1.25,
        ),
        _faster(f"`logp` of {given}", logp, "eager", "eager log_softmax + gather + entropy", 8),
        _faster("`delta_logp` of two such tensors", delta_logp, "eager", "eager", 8),
        _memory("peak memory over inputs and outputs, forward", records, False, FORWARD_MIB),
        _memory("the same, forward + backward", records, True, BACKWARD_MIB),
        _long(records),
        _linear(records),
        _ignored(records),
        *_sampling(records),
        *_decoding(records),
        *_policy(records),
    ]


def _select(records: Iterable[Record], **wanted: object) -> list[Record]:
    """Records that were measured and whose fields are as wanted; of several runs of a case the last one."""
    found = {}
    for entry in records:
        if entry.skipped is None and all(getattr(entry, name) == value for name, value in wanted.items()):
            of_work = (entry.op, entry.shape, entry.n, entry.dtype, entry.training, entry.variant)
            found[entry.case, entry.candidate, of_work] = entry
    return list(found.values())


def _main(records: Sequence[Record], op: str, training: bool = False, dtype: str | None = None) -> Record | None:
    """Our candidate on the table's shape; by default in the dtype of the op's first case."""
    entries = _select(
        records,
        case="compare",
        op=op,
        shape=MAIN.name,
        n=MAIN_N,
        dtype=dtype or ("bfloat16" if op.startswith("linear") else "float32"),
        training=training,
        candidate="ours",
        phase="both" if training else "forward",
    )
    return _last(entries)


def _line(what: str, reach: str, entry: Record | None, measure: Callable[[Record], tuple[str, bool]]) -> Line:
    return Line(what, reach, _NOT_MEASURED, None) if entry is None else Line(what, reach, *measure(entry))


def _slower(what: str, entry: Record | None, other: str, described: str, most: float) -> Line:
    """`other` is a candidate of the same case, described in words."""

    def measure(entry: Record) -> tuple[str, bool]:
        ratio = entry.ratio_to(other)
        return f"{ratio:.2f} × ({entry.median_ms:.0f} ms)", ratio <= most

    return _line(what, f"≤ {most} × {described}", entry, measure)


def _faster(what: str, entry: Record | None, other: str, described: str, least: float) -> Line:
    def measure(entry: Record) -> tuple[str, bool]:
        ratio = 1 / entry.ratio_to(other)
        assert entry.median_ms is not None
        digits = 0 if entry.median_ms >= 5 else 1
        return f"{ratio:.1f} × ({entry.median_ms:.{digits}f} ms)", ratio >= least

    return _line(what, f"≥ {least} × faster than {described}", entry, measure)


def _exact(what: str, entry: Record | None, most: float) -> Line:
    def measure(entry: Record) -> tuple[str, bool]:
        error = entry.errors["logp"]
        return f"{error:.1e}", error <= most

    return _line(what, f"≤ {most:.0e}", entry, measure)


def _memory(what: str, records: Sequence[Record], training: bool, most: int) -> Line:
    entries = _select(records, training=training, candidate="ours")
    entries = [entry for entry in entries if entry.peak_mib is not None]
    reach = f"≤ {most} MiB, whatever N and V"
    if not entries:
        return Line(what, reach, _NOT_MEASURED, None)
    worst = max(entries, key=lambda entry: entry.peak_mib or 0.0)
    assert worst.peak_mib is not None
    at = f"`{worst.op}`, N {worst.n}, V {worst.v}"
    return Line(what, reach, f"{worst.peak_mib:.0f} MiB, the most of {len(entries)} ({at})", worst.peak_mib <= most)


def _long(records: Sequence[Record]) -> Line:
    def measure(entry: Record) -> tuple[str, bool]:
        assert entry.peak_mib is not None and entry.median_ms is not None
        return f"{entry.median_ms / 1e3:.0f} s, {entry.peak_mib:.0f} MiB", entry.peak_mib <= FORWARD_MIB

    entries = _select(records, case="long")
    what = f"one pair, N {LONG_N}, D {MAIN.d}, V {MAIN.v}, bf16"
    return _line(what, f"finishes within {FORWARD_MIB} MiB", _last(entries), measure)


def _linear(records: Sequence[Record]) -> Line:
    what, reach = "`linear_delta_logp`: time over N", "linear within 5 %"
    entries = sorted(_select(records, case="linearity"), key=lambda entry: entry.n)
    if len(entries) < 2:
        return Line(what, reach, _NOT_MEASURED, None)
    first = entries[0]
    deviations = [entry.ratio_to(first.candidate) / (entry.n / first.n) - 1 for entry in entries[1:]]
    sizes = ", ".join(str(entry.n) for entry in entries)
    worst = max(deviations, key=abs)
    return Line(what, reach, f"{100 * worst:+.1f} % (N {sizes})", abs(worst) <= 0.05)


def _ignored(records: Sequence[Record]) -> Line:
    what, reach = "half the rows ignored", "≤ 0.55 × the time"
    entries = _select(records, case="half ignored", candidate="ours, half ignored")
    if not entries:
        return Line(what, reach, _NOT_MEASURED, None)
    ratios = {entry.op: entry.ratio_to("ours") for entry in entries}
    listed = ", ".join(f"{ratio:.2f} × `{op}`" for op, ratio in ratios.items())
    return Line(what, reach, listed, max(ratios.values()) <= 0.55)


def _sampling(records: Sequence[Record]) -> Iterator[Line]:
    work = {"op": sample.OP, "candidate": "ours", "dtype": "float32"}
    entries = _select(records, case="compare", n=sample.ROWS, shape=MAIN.name, variant=sample.MAIN_FILTER, **work)
    entry = _last([entry for entry in entries if {"warpers", "numpy"} <= entry.ratios.keys()])
    what = f"`{sample.OP}` fp32, B {sample.ROWS}, V {MAIN.v}, {sample.MAIN_FILTER}"
    yield _faster(what, entry, "warpers", "`transformers`' warpers + multinomial on the extrapolated logits", 15)
    yield _faster(
        f"`{sample.OP}`, the same", entry, "numpy", "the authors' loop over all log-probabilities, in numpy", 30
    )
    yield _line(
        f"`{sample.OP}`, {sample.DRAWS:,} draws from V {MAIN.v}, chi-square against exact probabilities",
        f"p > {LEAST_P:.0e} for {len(sample.SEEDS)} seeds",
        _last(_select(records, case="frequencies", **work)),
        _p_values,
    )
    yield _line(
        f"`{sample.OP}`, {sample.TAIL.v - 1:,} tokens of probability {sample.RARE:.0e} each, {sample.DRAWS:,} draws",
        f"as many as expected, within {MOST_SIGMAS} σ",
        _last(_select(records, case="tail", **work)),
        _tail,
    )


def _p_values(entry: Record) -> tuple[str, bool]:
    values = list(entry.statistics.values())
    return "p = " + ", ".join(f"{p:.2g}" for p in values), min(values) > LEAST_P


def _tail(entry: Record) -> tuple[str, bool]:
    drawn, expected = entry.statistics["drawn"], entry.statistics["expected"]
    return f"{drawn:.0f} drawn, {expected:.0f} expected", abs(drawn - expected) <= MOST_SIGMAS * expected**0.5


def _decoding(records: Sequence[Record]) -> Iterator[Line]:
    entries = _select(records, case="compare", op=decode.OP, n=decode.PROBLEMS, candidate="ours")
    what = f"`{decode.OP}`, demo pair, {decode.PROBLEMS} problems"

    def speed(entry: Record) -> tuple[str, bool]:
        ratio = 1 / entry.ratio_to("generate calls")
        return f"{ratio:.1f} × ({entry.tokens_per_s:,.0f} tokens/s)", ratio >= 5

    reach = "≥ 5 × the tokens/s of two `model.generate(max_new_tokens=1)` calls a step"
    yield _line(what, reach, _last(entries), speed)
    yield _slower(f"`{decode.OP}`, the same", _last(entries), "forwards", "the two models' forwards alone", 1.25)


def _policy(records: Sequence[Record]) -> Iterator[Line]:
    work = {"op": policy.OP, "variant": policy.DAPO.label, "phase": "both", "candidate": "ours"}
    entry = _last(_select(records, case="compare", shape=policy.SHAPE.name, **work))
    what = f"`{policy.OP}` forward + backward, B {policy.SEQUENCES}, T {policy.TOKENS}, DAPO"
    yield _faster(what, entry, "TRL", "eager, as TRL writes it", 4)

    def tensors(entry: Record) -> tuple[str, bool]:
        count = entry.statistics["tensors"]
        return f"{count:.2f}", count <= MOST_TENSORS

    reach = f"≤ {MOST_TENSORS} tensors of B·T"
    peak = _last(_select(records, case="memory", **work))
    yield _line(f"`{policy.OP}`, peak memory, gradient included", reach, peak, tensors)
    for dtype, short in (("bfloat16", "bf16"), ("float32", "fp32")):
        entry = _main(records, linear_policy.OP, training=True, dtype=dtype)
        what = f"`{linear_policy.OP}` {short}, N {MAIN_N}, D {MAIN.d}, V {MAIN.v}, all gradients"
        yield _slower(what, entry, "matmul", f"three bare {short} matmuls of N·V·D", 1.15)
        yield _faster(f"`{linear_policy.OP}` {short}, the same", entry, "eager", "eager", 2)

    def workspace(entry: Record) -> tuple[str, bool]:
        mib, logits = entry.statistics["MiB"], entry.statistics["MiB of float32 logits"]
        return f"{mib:.0f} MiB", mib <= BACKWARD_MIB and mib < logits / 2

    yield _line(
        f"`{linear_policy.OP}` bf16, N {MAIN_N}: peak memory over inputs and gradients, float32 until backward",
        f"≤ {BACKWARD_MIB} MiB, no N×V buffer: less than half the float32 logits",
        _last(_select(records, case="workspace", op=linear_policy.OP, n=MAIN_N)),
        workspace,
    )


def _last(entries: Sequence[Record]) -> Record | None:
    return entries[-1] if entries else None


def markdown(table: Sequence[Line]) -> str:
    met = {True: "yes", False: "no", None: ""}
    rows = [f"| {line.what} | {line.reach} | {line.measured} | {met[line.met]} |" for line in table]
    return "\n".join(["| what | reach | measured | met? |", "|---|---|---|---|", *rows])


def caption(runs: Sequence[Run]) -> str:
    """Where the figures come from."""
    sources = []
    for run in runs:
        env = run.environment
        commit = f"commit {env['commit'][:10]}" if env["commit"] else "no commit"
        if env["dirty"]:
            commit += " with changes"
        served = "+".join(sorted(set(env["backends"].values())))
        sources.append(
            f"{env['date'][:10]}, {env['machine']}, {env['threads']} threads, torch {env['versions']['torch']}, "
            f"backend `{served}`, {commit}, `benchmarks/results/{run.name}.json`{_busy(env)}"
        )
    return "Medians; a ratio is taken within a round of one run. " + "; ".join(sources) + "."


def _busy(env: dict[str, Any]) -> str:
    load, cores = env["load_average_at_start"], env["cores"]
    # A thread that shares its core delays all threads at every barrier: such figures are not to be published.
    return f" (**a busy machine**: load average {load:.1f} on {cores} cores)" if load > cores / 2 else ""


def section(runs: Sequence[Run]) -> str:
    records = [entry for run in runs for entry in run.records]
    return f"{markdown(lines(records))}\n\n{caption(runs)}"


def put_into(readme: Path, text: str, markers: tuple[str, str] = MARKERS) -> None:
    """Replace what stands between the markers in `readme`."""
    begin, end = markers
    content = readme.read_text()
    if content.count(begin) != 1 or content.count(end) != 1 or content.index(begin) > content.index(end):
        raise ValueError(f"{readme} needs one {begin} and after it one {end}")
    before, rest = content.split(begin)
    after = rest.split(end)[1]
    readme.write_text(f"{before}{begin}\n{text}\n{end}{after}")
