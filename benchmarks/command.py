"""`python -m benchmarks`: measure, print the acceptance table, keep the results."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from . import table
from .case import MODES
from .plans import PLANS
from .records import RESULTS, Record, Run, environment, read


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    options.command(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.set_defaults(command=_measure, mode="default")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--quick", dest="mode", action="store_const", const="quick", help="the table in 3 minutes")
    mode.add_argument("--full", dest="mode", action="store_const", const="full", help="also a batch of 131072 tokens")
    parser.add_argument("--only", choices=PLANS, action="append", metavar="OP", help=f"one of {', '.join(PLANS)}")
    parser.add_argument("--case", help="only cases whose description contains this, e.g. 'memory' or 'N=512'")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="folder for the JSON and CSV")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, help="threads on the CPU; as many as PyTorch takes by default")

    commands = parser.add_subparsers(title="commands")
    commands.add_parser("gpu", help="a visit to a GPU: python -m benchmarks gpu --help")
    readme = commands.add_parser("readme", help="write stored results between the markers of a README")
    readme.set_defaults(command=_readme)
    plot = commands.add_parser("plot", help="draw time and memory over N")
    plot.set_defaults(command=_plot)
    for command in (readme, plot):
        command.add_argument(
            "results", type=Path, nargs="*", help="JSON files; later ones win. Newest full run if none"
        )
    readme.add_argument("--readme", type=Path, default=RESULTS.parent.parent / "README.md")
    plot.add_argument("--out", type=Path, default=RESULTS / "over_n.png", metavar="PNG")
    return parser


def _measure(options: argparse.Namespace) -> None:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    run = Run(environment(device), {"mode": options.mode, "only": options.only, "case": options.case})
    cases = [
        case
        for op in options.only or PLANS
        for case in PLANS[op](device, options.mode)
        if options.case is None or options.case in case.label
    ]
    start = time.perf_counter()
    for number, case in enumerate(cases, 1):
        begin = time.perf_counter()
        _progress(f"[{number}/{len(cases)}] {case.label}")
        records = list(case.run())
        run.records += records
        path = run.write(options.out)
        for line in map(_summary, records):
            _progress(f"    {line}")
        _progress(f"    took {time.perf_counter() - begin:.0f} s, {time.perf_counter() - start:.0f} s in all")
    if cases:
        _progress(f"wrote {path} and .csv")
    print(table.section([run]))
    wrong = [f"{entry.op} {entry.skipped}" for entry in run.records if entry.wrong]
    if wrong:
        raise SystemExit("wrong results, not timed: " + "; ".join(wrong))


def _summary(entry: Record) -> str:
    if entry.skipped is not None:
        return f"{entry.candidate}: skipped, {entry.skipped}"
    parts = [f"{entry.candidate} {entry.phase}:"]
    if entry.median_ms is not None:
        parts.append(f"{entry.median_ms:.1f} ms ({entry.p20_ms or entry.median_ms:.1f} …")
        parts.append(f"{entry.p80_ms or entry.median_ms:.1f}, {entry.rounds} rounds)")
    if entry.peak_mib is not None:
        parts.append(f"{entry.peak_mib:.1f} MiB")
    if entry.tokens_per_s is not None:
        parts.append(f"{entry.tokens_per_s:.0f} tokens/s")
    parts += [f"= {ratio[0]:.3f} × {other}" for other, ratio in entry.ratios.items() if other in ("matmul", "ours")]
    parts += [f"{name} {value:.4g}" for name, value in entry.statistics.items()]
    if "logp" in entry.errors:
        parts.append(f"log p error {entry.errors['logp']:.1e}")
    return " ".join(parts)


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _newest(wanted: Callable[[Run], bool]) -> Run | None:
    """The newest run of all cases in the results folder that is as wanted; a visit to a GPU is no such run."""
    for path in sorted(RESULTS.glob("[0-9]*.json"), reverse=True):
        run = read(path)
        if wanted(run) and not run.settings["only"] and not run.settings["case"]:
            return run
    return None


def _stored(given: Sequence[Run]) -> list[Run]:
    """The given runs, or the newest one that was not a quick one."""
    if given:
        return list(given)
    newest = _newest(lambda run: run.settings["mode"] in MODES[1:])
    if newest is None:
        raise SystemExit(f"{RESULTS} has no complete run: python -m benchmarks --full")
    return [newest]


def _readme(options: argparse.Namespace) -> None:
    table.put_into(options.readme, table.section(_stored([read(path) for path in options.results])))


def _plot(options: argparse.Namespace) -> None:
    # matplotlib is not needed to measure.
    from .plot import draw

    draw(_stored([read(path) for path in options.results]), options.out)
