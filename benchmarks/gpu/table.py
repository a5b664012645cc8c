"""What a run on a GPU prints last, and what the README shows of it: all of it computed from records."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from .. import bench_extrapolated_sample as sample
from .. import bench_linear_policy_loss as linear_policy
from .. import bench_policy_loss as policy
from .. import peers
from ..records import Record, Run
from ..shapes import Shape, Workload
from ..table import Line, markdown
from . import checks
from .cases import REAL, TINY, Sizes

MARKERS = ("<!-- gpu table -->", "<!-- /gpu table -->")
MOST_LINES = 75

GEMM_FORWARD, GEMM_STEP, COPY, READ = 0.92, 0.85, 0.90, 0.8
#: Of sampling: the copy's bandwidth from so many rows on, and microseconds of one row.
SAMPLE_COPY, SAMPLE_ROWS, SAMPLE_US = 0.75, 64, 25
#: Of the policy losses: the rate of a step's products, times another library's, MiB over gradients; launches of forward
#: and backward, the copy's bandwidth.
POLICY_STEP, POLICY_FASTER, POLICY_MIB, POLICY_LAUNCHES, POLICY_COPY = 0.88, 1.25, 1024, 2, 0.8
ERROR, FORWARD_MIB, BACKWARD_MIB, HOST_US, IGNORED = 5e-6, 64, 512, 25, 0.55
#: What the baselines and the floor are called; every other candidate is ours or another library's.
_NOT_PEERS = ("ours", "eager", "compiled", "matmul", "matmul, real", "copy", "read")
#: Whose statistics and memory are not those of the other cases.
_OF_THEIR_OWN = ("ceilings", "policy loss", "policy step")
_NOT_MEASURED = "not measured"


def report(run: Run) -> str:
    """At most MOST_LINES lines."""
    parts = [_head(run), markdown(acceptance(run))]
    parts += ["\n".join(table) for table in (_beside(run), _samplers(run), _variants(run), _tuning(run)) if table]
    lines = "\n\n".join(parts).splitlines()
    problems = [line[:200] for line in _problems(run)]
    room = max(1, MOST_LINES - len(lines) - 3)
    if len(problems) > room:
        problems = [*problems[: room - 1], f"- {len(problems) - room + 1} more: see `skipped` in the CSV"]
    if problems:
        lines += ["", "Without a figure:", *problems]
    return "\n".join(lines[:MOST_LINES])


def section(run: Run | None) -> str:
    """For the README."""
    if run is None:
        return "Not yet measured: no result of `python -m benchmarks gpu` has been recorded."
    tables = [table for table in (_beside(run), _samplers(run), _variants(run)) if table]
    return "\n\n".join([markdown(acceptance(run)), *("\n".join(table) for table in tables), _caption(run)])


def acceptance(run: Run) -> list[Line]:
    return list(_acceptance(_Found(run)))


class _Found:
    """Records of a run by what they are of."""

    def __init__(self, run: Run) -> None:
        self.sizes: Sizes = TINY if run.settings["tiny"] else REAL
        self.measured = [entry for entry in run.records if entry.skipped is None]

    def one(self, kind: str, work: Workload, candidate: str, phase: str | None = None) -> Record | None:
        phase = phase or ("both" if work.training else "forward")
        entries = (e for e in self.of(kind, work) if e.candidate == candidate and e.phase == phase)
        return next(entries, None)

    def of(self, kind: str, work: Workload) -> Iterator[Record]:
        for entry in self.measured:
            of_entry = (entry.op, entry.shape, entry.n, entry.dtype, entry.training, entry.variant)
            of_work = (work.op, work.shape.name, work.n, work.dtype, work.training, work.variant)
            if entry.case == kind and of_entry == of_work:
                yield entry

    def ours(self, dtype: str) -> list[Record]:
        entries = (e for e in self.measured if e.candidate == "ours" and e.dtype == dtype)
        return [e for e in entries if e.case not in _OF_THEIR_OWN]

    def main(self, op: str, training: bool = False) -> Workload:
        return self.sizes.main(op, training)


def _acceptance(found: _Found) -> Iterator[Line]:
    head = _where(found.sizes)
    single, pair = found.main("linear_logp"), found.main("linear_delta_logp")
    yield _of_gemm(found, f"`linear_logp` forward, {head}", single, GEMM_FORWARD, "the bare GEMM's rate")
    yield _beside_peers(found, "the same, beside Liger's SM90 kernel", single, ("liger sm90", "liger sm90, log p"))
    yield _of_gemm(found, "`linear_delta_logp` forward, same shape", pair, GEMM_FORWARD, "the rate of two bare GEMMs")
    yield _beside_peers(found, "the same, beside two calls of the fastest library", pair, None)
    step, pair_step = found.main("linear_logp", True), found.main("linear_delta_logp", True)
    yield _of_gemm(found, "`linear_logp` forward + backward", step, GEMM_STEP, "the GEMM's rate for 8·N·V·D")
    yield _of_gemm(found, "`linear_delta_logp` forward + backward, frozen base", pair_step, None, "12·N·V·D")
    for op in ("logp", "delta_logp"):
        for phase in ("forward", "backward"):
            yield _of_copy(found, op, phase)
    yield _worst_error(found)
    yield _worst_peak(found, training=False, most=FORWARD_MIB)
    yield _worst_peak(found, training=True, most=BACKWARD_MIB)
    yield from _small(found)
    yield _ignored(found)
    yield from _sampling(found)
    yield from _policy_step(found)
    yield from _policy_loss(found)


def _where(sizes: Sizes) -> str:
    return f"{sizes.dtype}, N {sizes.n}, D {sizes.head.d}, V {sizes.head.v}"


def _line(what: str, reach: str, entry: Record | None, measure: Callable[[Record], tuple[str, bool | None]]) -> Line:
    return Line(what, reach, _NOT_MEASURED, None) if entry is None else Line(what, reach, *measure(entry))


def _of_gemm(found: _Found, what: str, work: Workload, least: float | None, of: str, kind: str = "compare") -> Line:
    def measure(entry: Record) -> tuple[str, bool | None]:
        if "matmul" not in entry.ratios:
            return _NOT_MEASURED, None
        rate = 1 / entry.ratio_to("matmul")
        return (
            f"{rate:.2f} ({entry.median_ms:.2f} ms, {entry.tflops:.0f} TFLOP/s)",
            None if least is None else rate >= least,
        )

    reach = f"of {of}" if least is None else f"≥ {least} of {of}"
    return _line(what, reach, found.one(kind, work, "ours"), measure)


def _beside_peers(
    found: _Found, what: str, work: Workload, names: Sequence[str] | None, kind: str = "peers", least: float = 1.0
) -> Line:
    """Faster than each; at least so many times as fast, if `least` is more than 1."""
    entries = (e for e in _whole(found.of(kind, work)) if "ours" in e.ratios)
    peers = [e for e in entries if (_is_peer(e) if names is None else e.candidate in names)]
    fastest = min(peers, key=lambda e: e.ratio_to("ours"), default=None)

    def measure(entry: Record) -> tuple[str, bool]:
        ratio = entry.ratio_to("ours")
        met = ratio > 1 if least == 1.0 else ratio >= least
        return f"{ratio:.2f} × faster than {entry.candidate} ({entry.median_ms:.2f} ms)", met

    return _line(what, "faster" if least == 1.0 else f"≥ {least} × faster", fastest, measure)


def _is_peer(entry: Record) -> bool:
    return entry.candidate not in _NOT_PEERS


def _of_copy(found: _Found, op: str, phase: str) -> Line:
    def measure(entry: Record) -> tuple[str, bool]:
        rate = 1 / entry.ratio_to("copy")
        return f"{rate:.2f} ({entry.median_ms:.2f} ms, {entry.gb_per_s:.0f} GB/s)", rate >= COPY

    # Forward has a case of its own; that of a training step keeps what backward needs.
    entry = found.one("compare", found.main(op, training=phase == "backward"), "ours", phase)
    entry = entry if entry is not None and "copy" in entry.ratios else None
    return _line(f"`{op}` of given logits, {phase}", f"≥ {COPY:.2f} of a copy's bandwidth", entry, measure)


def _worst_error(found: _Found) -> Line:
    errors = [
        (error, entry)
        for entry in found.ours(found.sizes.dtype)
        for name, error in entry.errors.items()
        if name.removeprefix("base_") in ("logp", "entropy")
    ]
    what, reach = f"log p and entropy against float64, {found.sizes.dtype}", f"≤ {ERROR:.0e}"
    if not errors:
        return Line(what, reach, _NOT_MEASURED, None)
    worst, entry = max(errors, key=lambda found: found[0])
    return Line(what, reach, f"{worst:.1e} (`{entry.op}`, {entry.shape}, N {entry.n})", worst <= ERROR)


def _worst_peak(found: _Found, training: bool, most: int) -> Line:
    entries = [e for e in found.ours(found.sizes.dtype) if e.training == training and e.peak_mib is not None]
    what = "peak memory over inputs, outputs, gradients: " + ("forward + backward" if training else "forward")
    worst = max(entries, key=lambda e: e.peak_mib or 0.0, default=None)

    def measure(entry: Record) -> tuple[str, bool]:
        assert entry.peak_mib is not None
        return f"{entry.peak_mib:.0f} MiB (`{entry.op}`, {entry.shape}, N {entry.n})", entry.peak_mib <= most

    return _line(what, f"≤ {most} MiB", worst, measure)


def _small(found: _Found) -> Iterator[Line]:
    entries = [e for e in found.measured if e.case == "small" and e.candidate == "ours"]
    tokens = ", ".join(map(str, found.sizes.small))
    slowest = max(entries, key=lambda e: e.host_us or 0.0, default=None)
    yield _line(
        f"N {tokens}: the host's time of one call",
        f"≤ {HOST_US} µs",
        slowest,
        lambda e: (f"{e.host_us:.0f} µs (`{e.op}`, N {e.n})", (e.host_us or 0.0) <= HOST_US),
    )
    timed = [e for e in entries if "copy" in e.ratios]
    farthest = max(timed, key=lambda e: e.ratio_to("copy"), default=None)
    yield _line(
        f"N {tokens}: time to read the weights once, at a copy's bandwidth",
        f"≥ {READ} of the time",
        farthest,
        lambda e: (f"{1 / e.ratio_to('copy'):.2f} (`{e.op}`, N {e.n}, {e.gb_per_s:.0f} GB/s)", _reads(e)),
    )


def _reads(entry: Record) -> bool:
    return 1 / entry.ratio_to("copy") >= READ


def _ignored(found: _Found) -> Line:
    entry = found.one("half ignored", found.main("linear_logp"), "ours, half ignored")
    entry = entry if entry is not None and "ours" in entry.ratios else None
    return _line(
        "half the rows ignored",
        f"≤ {IGNORED} × the time",
        entry,
        lambda e: (f"{e.ratio_to('ours'):.2f} × `{e.op}`", e.ratio_to("ours") <= IGNORED),
    )


def _sampling(found: _Found) -> Iterator[Line]:
    """With top-p, a pair at the copy's bandwidth and in time; one model's logits beside another library's sampler."""
    batches = found.sizes.batches
    head = f"`{sample.OP}` {found.sizes.dtype}, V {found.sizes.head.v}, {sample.MAIN_FILTER}"
    works = {rows: found.sizes.sample(rows, sample.MAIN_FILTER) for rows in batches}
    many = [rows for rows in batches if rows >= SAMPLE_ROWS] or list(batches[-1:])
    entries = [entry for rows in many if (entry := found.one("sample", works[rows], "ours"))]
    slowest = max((e for e in entries if "copy" in e.ratios), key=lambda e: e.ratio_to("copy"), default=None)
    yield _line(
        f"{head}, B {_range(many)}",
        f"≥ {SAMPLE_COPY} of a copy's bandwidth, both rows read once",
        slowest,
        lambda e: (f"{1 / e.ratio_to('copy'):.2f} (B {e.n}, {e.gb_per_s:.0f} GB/s)", _copies_fast(e)),
    )
    yield _line(
        "the same, B 1",
        f"≤ {SAMPLE_US} µs",
        found.one("sample", works[1], "ours"),
        lambda e: (f"{1e3 * (e.median_ms or 0.0):.0f} µs", 1e3 * (e.median_ms or 0.0) <= SAMPLE_US),
    )
    peers = [entry for rows in batches if (entry := found.one("sample", works[rows], "flashinfer"))]
    compared = [entry for entry in peers if "ours, one model" in entry.ratios]
    yield _line(
        f"one model's logits, {sample.MAIN_FILTER}, beside FlashInfer, B {_range(batches)}",
        "faster at every B",
        min(compared, key=lambda e: e.ratio_to("ours, one model"), default=None),
        lambda e: (f"{e.ratio_to('ours, one model'):.2f} × faster, B {e.n}", _faster_everywhere(compared, batches)),
    )


def _policy_step(found: _Found) -> Iterator[Line]:
    """Loss and gradients from hidden states, beside three bare products and other libraries; its memory."""
    work, kind = found.sizes.policy_step, "policy step"
    what = f"`{linear_policy.OP}` forward + backward, {_where(found.sizes)}"
    yield _of_gemm(found, what, work, POLICY_STEP, "the GEMM's rate for 6·N·V·D", kind)
    names = [peer.name for peer in peers.PEERS if peer.op == linear_policy.OP]
    what = "the same, beside Liger's scaled cross-entropy and its GRPO loss"
    yield _beside_peers(found, what, work, names, kind, POLICY_FASTER)
    entry = found.one(kind, work, "ours")
    yield _line(
        "the same, peak memory over inputs and gradients",
        f"≤ {POLICY_MIB} MiB",
        entry if entry is not None and entry.peak_mib is not None else None,
        lambda e: (f"{e.peak_mib:.0f} MiB", (e.peak_mib or 0.0) <= POLICY_MIB),
    )


def _policy_loss(found: _Found) -> Iterator[Line]:
    """Of given log-probabilities: launches on the GPU, and the bandwidth."""
    work = found.sizes.policy_loss
    entry = found.one("policy loss", work, "ours")
    yield _line(
        f"`{policy.OP}` of {work.n} tokens, {work.variant}, forward + backward",
        f"≤ {POLICY_LAUNCHES} launches",
        entry if entry is not None and "launches" in entry.statistics else None,
        lambda e: (f"{e.statistics['launches']:.0f}", e.statistics["launches"] <= POLICY_LAUNCHES),
    )
    yield _line(
        "the same",
        f"≥ {POLICY_COPY} of a copy's bandwidth",
        entry if entry is not None and "copy" in entry.ratios else None,
        lambda e: (f"{1 / e.ratio_to('copy'):.2f} ({_us(e)} µs, {e.gb_per_s:.0f} GB/s)", _streams(e)),
    )


def _streams(entry: Record) -> bool:
    return 1 / entry.ratio_to("copy") >= POLICY_COPY


def _range(rows: Sequence[int]) -> str:
    return f"{rows[0]}…{rows[-1]}" if len(rows) > 1 else f"{rows[0]}"


def _copies_fast(entry: Record) -> bool:
    return 1 / entry.ratio_to("copy") >= SAMPLE_COPY


def _faster_everywhere(compared: Sequence[Record], batches: Sequence[int]) -> bool:
    return len(compared) == len(batches) and all(entry.ratio_to("ours, one model") > 1 for entry in compared)


def _samplers(run: Run) -> list[str]:
    """Candidate × rows: microseconds. Of ours, what it chose and the kernels for GPUs; the rest is in the CSV."""
    found = _Found(run)
    works = [found.sizes.sample(rows, sample.MAIN_FILTER) for rows in found.sizes.batches]
    entries = [{e.candidate: e for e in found.of("sample", work)} for work in works]
    shown = ("ours", "ours, triton", "ours, cuda", "ours, one model", "eager", "compiled")
    names = [*shown, *(peer.name for peer in peers.PEERS if peer.op == sample.OP)]
    names = [name for name in names if any(name in of_work for of_work in entries)]
    rows = [[name, *(_us(of_work.get(name)) for of_work in entries)] for name in names]
    return _table([f"µs, `{sample.OP}`, {sample.MAIN_FILTER}", *(f"B {work.n}" for work in works)], rows)


def _us(entry: Record | None) -> str:
    return "" if entry is None or entry.median_ms is None else f"{1e3 * entry.median_ms:.0f}"


def _beside(run: Run) -> list[str]:
    """Candidate × linear op: milliseconds; then the largest errors of the one-model forward, and memory in training."""
    found = _Found(run)
    works = [found.main(op, training) for op in ("linear_logp", "linear_delta_logp") for training in (False, True)]
    entries = [{e.candidate: e for e in _whole(found.of("peers", work))} for work in works]
    eager = [found.one("compare", work, "eager") for work in works]
    for of_work, entry in zip(entries, eager, strict=True):
        if of_work and entry is not None:
            of_work["eager"] = entry
    names = list(dict.fromkeys(name for of_work in entries for name in of_work))
    rows = [[name, *(_ms(of_work.get(name)) for of_work in entries), *_errors(entries, name)] for name in names]
    head = ["ms", "`linear_logp`", "+ backward", "`linear_delta_logp`", "+ backward"]
    return _table([*head, "log p error", "entropy error", "peak MiB, training"], rows)


def _whole(entries: Iterable[Record]) -> list[Record]:
    return [entry for entry in entries if entry.phase == ("both" if entry.training else "forward")]


def _ms(entry: Record | None) -> str:
    return "" if entry is None or entry.median_ms is None else f"{entry.median_ms:.2f}"


def _errors(entries: Sequence[dict[str, Record]], name: str) -> list[str]:
    found = [of_work[name] for of_work in entries if name in of_work]
    errors = {output: error for entry in reversed(found) for output, error in entry.errors.items()}
    peaks = [entry.peak_mib for entry in found if entry.training and entry.peak_mib is not None]
    cells = [f"{errors[output]:.0e}" if output in errors else "" for output in ("logp", "entropy")]
    return [*cells, f"{max(peaks):.0f}" if peaks else ""]


def _variants(run: Run) -> list[str]:
    """Per op and workload, which of our backends was faster in forward, and how many times as long the other took."""
    found = _Found(run)
    columns = list(_variant_columns(found.sizes))
    rows = []
    for op in ("linear_logp", "linear_delta_logp"):
        cells = [_winner(found, kind, Workload(op, shape, n, dtype)) for _, kind, shape, n, dtype in columns]
        if any(cells):
            rows.append([f"`{op}`", *cells])
    return _table(["faster in forward", *(name for name, *_ in columns)], rows)


def _variant_columns(sizes: Sizes) -> Iterator[tuple[str, str, Shape, int, str]]:
    """The shapes at the table's N; then other N and dtypes at the table's shape."""
    for shape in (sizes.head, *sizes.others):
        yield shape.name, "compare", shape, sizes.n, sizes.dtype
    for n in sizes.small:
        yield f"N {n}", "small", sizes.head, n, sizes.dtype
    yield f"N {sizes.long}", "compare", sizes.head, sizes.long, sizes.dtype
    yield "fp16", "compare", sizes.head, sizes.n, "float16"
    yield f"fp32, N {sizes.float32_n}", "compare", sizes.head, sizes.float32_n, "float32"


def _winner(found: _Found, kind: str, work: Workload) -> str:
    entry = found.one(kind, work, "ours, gemm")
    if entry is None or "ours, triton" not in entry.ratios:
        return ""
    ratio = entry.ratio_to("ours, triton")
    return f"triton {ratio:.2f} ×" if ratio >= 1 else f"gemm {1 / ratio:.2f} ×"


def _tuning(run: Run) -> list[str]:
    """Tile configurations, the fastest first."""
    found = [e for e in run.records if e.case == "tune" and e.skipped is None and e.candidate != "matmul"]
    found.sort(key=lambda e: (e.op, e.shape, e.median_ms))
    rows = [[f"{e.op} {e.shape}", e.candidate.removeprefix("ours, "), _ms(e), f"{e.tflops:.0f}"] for e in found]
    return _table(["tune", "configuration", "ms", "TFLOP/s"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:]]


def _problems(run: Run) -> Iterator[str]:
    """First what failed of ours, then of others; what is not installed or available only once."""
    for failure in (run.tests or {}).get("failures", [])[:5]:
        yield f"- {failure['test']}: {failure['message']}"
    skipped = [entry for entry in run.records if entry.skipped is not None]
    skipped.sort(key=lambda entry: not entry.candidate.startswith("ours"))
    missing = {e.candidate: None for e in skipped if (e.skipped or "").startswith(peers.MISSING)}
    reasons: dict[tuple[str, str], list[str]] = {}
    for entry in skipped:
        if entry.candidate in missing:
            continue
        where = f"{entry.case} {entry.op} {entry.shape} N {entry.n}{' training' if entry.training else ''}"
        reasons.setdefault((entry.candidate, entry.skipped or ""), []).append(where)
    for (candidate, reason), places in reasons.items():
        more = f" and {len(places) - 1} more" if len(places) > 1 else ""
        yield f"- {candidate} ({places[0]}{more}): {reason}"
    if missing:
        yield f"- {peers.MISSING}: {'; '.join(missing)}"


def _head(run: Run) -> str:
    ceilings = {e.candidate: e for e in run.records if e.case == "ceilings" and e.skipped is None}
    lines = [f"{_machine(run)}."]
    if {"matmul", "copy"} <= ceilings.keys():
        matmul, copy = ceilings["matmul"], ceilings["copy"]
        lines.append(
            f"This GPU, measured: {matmul.dtype} matmul {matmul.n}³ {matmul.tflops:.0f} TFLOP/s, "
            f"copy {copy.gb_per_s:.0f} GB/s read and written."
        )
    return "\n".join([*lines, *checks.summary(run.tests)])


def _machine(run: Run) -> str:
    env = run.environment
    versions = env["versions"]
    driver = (env.get("gpu") or {}).get("driver_version", "unknown")
    return (
        f"{env['date'][:10]}, {env['machine']}, driver {driver}, torch {versions['torch']}, "
        f"triton {versions['triton']}, CUDA {versions['cuda']}"
    )


def _caption(run: Run) -> str:
    commit = run.environment["commit"]
    tested = " ".join(checks.summary(run.tests))
    return (
        f"Medians over interleaved rounds; a ratio is taken within a round. {tested} {_machine(run)}, "
        f"{'no commit' if commit is None else f'commit {commit[:10]}'}, `benchmarks/results/{run.name}.json`."
    )
