"""`python -m benchmarks`: measure every op, or one of your own shape; keep the results; put them into the README."""

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd
import torch

from . import results
from .cases import BENCHES, MODES, Row, cases, compare, memory
from .results import RESULTS
from .shapes import DTYPES, Shape, Workload
from .timing import Budget

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", **{name: name for name in DTYPES}}


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if getattr(options, "threads", None) is not None:
        torch.set_num_threads(options.threads)
    options.command(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.set_defaults(command=_measure, mode="default")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--quick", dest="mode", action="store_const", const=MODES[0], help="few shapes, 3 minutes")
    mode.add_argument("--full", dest="mode", action="store_const", const=MODES[2], help="also a batch of 131072 tokens")
    parser.add_argument("--only", choices=BENCHES, action="append", metavar="OP", help=f"one of {', '.join(BENCHES)}")
    parser.add_argument("--case", help="only cases whose description contains this, e.g. 'memory' or 'N=512'")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="folder of the table of results")

    commands = parser.add_subparsers(title="commands")
    commands.add_parser("gpu", help="a visit to a GPU: python -m benchmarks gpu --help")
    shape = commands.add_parser("shape", help="an op of your own shape beside eager PyTorch and torch.compile")
    shape.set_defaults(command=_shape)
    linear = [op for op in BENCHES if op.endswith("logp")]
    shape.add_argument("--op", choices=linear, default="linear_logp", help="default: linear_logp")
    shape.add_argument("--n", type=int, default=2048, help="tokens (default 2048)")
    shape.add_argument("--d", type=int, help="hidden size")
    shape.add_argument("--v", type=int, help="vocabulary")
    shape.add_argument("--dtype", choices=_DTYPES, default="bf16", help="default: bf16")
    shape.add_argument("--training", action="store_true", help="forward and backward")
    shape.add_argument("--model", metavar="DIR", help="take hidden size, vocabulary and softcap from its config.json")
    shape.add_argument("--seconds", type=float, default=20.0, help="of the rounds (default 20)")
    for command in (parser, shape):
        command.add_argument("--device", default="cpu", type=torch.device, help="cpu (default) or cuda")
        command.add_argument("--threads", type=int, help="threads on the CPU; as many as PyTorch takes by default")

    readme = commands.add_parser("readme", help="write ratios from the table of results between the README's markers")
    readme.set_defaults(command=_readme)
    readme.add_argument("--readme", type=Path, default=RESULTS.parent.parent / "README.md")
    plot = commands.add_parser("plot", help="draw time and memory over N from the table of results")
    plot.set_defaults(command=_plot)
    plot.add_argument("--png", type=Path, default=RESULTS / "over_n.png")
    for command in (readme, plot):
        command.add_argument("results", type=Path, nargs="?", default=RESULTS / "cpu.csv", help="cpu.csv if not given")
    return parser


def _measure(options: argparse.Namespace) -> None:
    """Every case, its rows written as soon as it has ended."""
    where, everything = results.environment(options.device)
    path = options.out / f"{options.device.type}.csv"
    chosen = [case for op in options.only or BENCHES for case in cases(op, options.device, options.mode)]
    chosen = [(label, run) for label, run in chosen if options.case is None or options.case in label]
    start, found = time.perf_counter(), list[Row]()
    for number, (label, run) in enumerate(chosen, 1):
        _progress(f"[{number}/{len(chosen)}] {label}")
        rows = [row | where for row in run()]
        found += rows
        results.write(results.merged(results.read(path) if path.exists() else None, rows), path)
        _progress(f"{results.measured(pd.DataFrame(rows))}\n    {time.perf_counter() - start:.0f} s in all")
    if found:
        path.with_name(f"{options.device.type}_environment.txt").write_text(f"{everything}\n")
        print(results.measured(pd.DataFrame(found)))
    _refuse_wrong(found)


def _shape(options: argparse.Namespace) -> None:
    """Times in rounds, then the memory of each candidate in a process of its own."""
    work = Workload(options.op, _shape_of(options), options.n, _DTYPES[options.dtype], options.training)
    names = ("ours", "eager", "compiled")
    _progress(f"{work}, {options.device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    rows = list(compare(work, options.device, Budget(options.seconds), names))
    for name in names:
        rows += memory(work, name, options.device)
    print(results.measured(pd.DataFrame(rows)))
    _refuse_wrong(rows)


def _shape_of(options: argparse.Namespace) -> Shape:
    """The given sizes; what is not given is that of the model."""
    d, v, softcap = options.d, options.v, None
    if options.model is not None:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(options.model).get_text_config()
        d, v = d or config.hidden_size, v or config.vocab_size
        softcap = getattr(config, "final_logit_softcapping", None)
    if v is None or (d is None and options.op.startswith("linear")):
        raise SystemExit("give --d and --v, or --model DIR")
    return Shape("yours", d or 0, v, softcap)


def _refuse_wrong(rows: Iterable[Row]) -> None:
    wrong = [f"{row['op']} {row['skipped']}" for row in rows if row.get("wrong")]
    if wrong:
        raise SystemExit("wrong results, not timed: " + "; ".join(wrong))


def _readme(options: argparse.Namespace) -> None:
    results.put_into(options.readme, results.ratios(results.read(options.results)))


def _plot(options: argparse.Namespace) -> None:
    # matplotlib is not needed to measure.
    from .plot import draw

    draw(results.read(options.results), options.png)


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
