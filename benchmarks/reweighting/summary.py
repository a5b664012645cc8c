"""The table, the figure and the JSON of finished runs; what is written of them into a README."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dlogp_kernels.report.files import write_atomically
from dlogp_kernels.report.responses import Estimate

from .options import METHODS

MARKERS = ("<!-- reweighting table -->", "<!-- /reweighting table -->")
NAMES = {"none": "DAPO", "low_prob": "low_prob", "dominate": "dominate", "ppl": "ppl"}
#: |difference ÷ standard error| that 5 % of differences between equals exceed, by the number of seeds.
_T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}

Quantity = Callable[[dict[str, Any]], float]
#: A name, what of a run, and the same of the base model.
Column = tuple[str, Quantity, float | None]


def write(results: dict[str, Any], directory: Path) -> list[Path]:
    """Write `reweighting.json`, `.md` and `.png`; their paths."""
    # matplotlib is not needed to train.
    from .figure import draw

    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"reweighting.{kind}" for kind in ("json", "md", "png")]
    write_atomically(paths[0], (_json(results) + "\n").encode())
    write_atomically(paths[1], markdown(results).encode())
    draw(results, paths[2])
    return paths


def avg(run: dict[str, Any]) -> float:
    return run["evaluation"]["avg"]


def passed(run: dict[str, Any]) -> float:
    return run["evaluation"]["pass"]


def training_accuracy(run: dict[str, Any]) -> float:
    """Of all responses that were learned from: how fast a run got better."""
    return statistics.fmean(run["curves"]["accuracy"])


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and its standard error over seeds."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(statistics.fmean(values), error)


def of_method(results: dict[str, Any], method: str) -> dict[int, dict[str, Any]]:
    """The runs of a method by seed."""
    return {run["seed"]: run for run in results["runs"] if run["method"] == method}


def differences(results: dict[str, Any], method: str, quantity: Quantity) -> list[float]:
    """To DAPO, of the seeds that both have."""
    ours, dapo = of_method(results, method), of_method(results, "none")
    return [quantity(ours[seed]) - quantity(dapo[seed]) for seed in sorted(ours.keys() & dapo.keys())]


def table(results: dict[str, Any]) -> str:
    """A row for each method, ± one standard error over seeds; differences are paired by seed."""
    return _table(results, [*_held_out(results), ("accuracy in training", training_accuracy, None)])


def _held_out(results: dict[str, Any]) -> list[Column]:
    samples, base = results["settings"]["samples_per_problem"], results["base"]
    return [(f"avg@{samples}", avg, base["avg"]), (f"pass@{samples}", passed, base["pass"])]


def _table(results: dict[str, Any], columns: Sequence[Column]) -> str:
    heads = ["method", "α", "seeds", *(head for name, _, _ in columns for head in (name, "minus DAPO"))]
    cells = [heads, [":---", *["---:"] * (len(heads) - 1)]]
    of_base = ("–" if base is None else f"{base:.4f}" for _, _, base in columns)
    cells.append(["base model", "–", "–", *(cell for value in of_base for cell in (value, "–"))])
    for method, alpha in METHODS.items():
        runs = of_method(results, method)
        if not runs:
            continue
        row = [NAMES[method], f"{alpha:g}" if alpha else "–", str(len(runs))]
        for _, quantity, _ in columns:
            apart = differences(results, method, quantity)
            row.append(_value(estimate([quantity(run) for run in runs.values()])))
            row.append("–" if method == "none" or not apart else _signed(estimate(apart)))
        cells.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def lemma_text(results: dict[str, Any]) -> str:
    """What Lemma 3.1 came to over all runs."""
    checks = [check for run in results["runs"] for check in run["lemma"]]
    tokens, clipped = (sum(check[name] for check in checks) for name in ("num_tokens", "num_clipped"))
    deviation, norm = (
        max((check[name] for check in checks), default=0.0) for name in ("largest_deviation", "largest_clipped")
    )
    return (
        f"Lemma 3.1, looked at in {len(checks)} optimiser steps: over {tokens:,} tokens the l1 norm of the gradient "
        f"with respect to the logits is 2 abs(w) (1 − π) within a relative {deviation:.0e}; the largest norm of the "
        f"{clipped:,} clipped tokens is {norm:g}."
    )


def markdown(results: dict[str, Any]) -> str:
    """`reweighting.md`."""
    paragraphs = [
        "# Reweighting on the demo task",
        _training_text(results),
        _evaluation_text(results),
        table(results),
        "Every run:",
        "\n".join(_runs_table(results)),
        lemma_text(results),
        "![accuracy, entropy and length over rollouts](reweighting.png)",
        _origin_text(results),
    ]
    return "\n\n".join(paragraphs) + "\n"


def _training_text(results: dict[str, Any]) -> str:
    chosen = results["settings"]
    prompts, samples = chosen["prompts_per_rollout"], chosen["samples_per_prompt"]
    return (
        f"The demo's base model, trained for {chosen['rollouts']} rollouts of {prompts * samples} responses ({prompts} "
        f"prompts × {samples}), {chosen['minibatches']} optimiser steps each, learning rate "
        f"{chosen['learning_rate']:g}: DAPO's loss (clip 0.2/0.28, dual clip 10, token mean, no KL term), the same "
        "prompts and noise for all methods of a seed. Without dynamic sampling, so that all see the same prompts, and "
        "without an overlong penalty. All reweightings have the same α, and none was tuned."
    )


def _evaluation_text(results: dict[str, Any]) -> str:
    chosen = results["settings"]
    samples, seeds = chosen["samples_per_problem"], len(of_method(results, "none"))
    text = (
        f"avg@{samples} and pass@{samples}: {chosen['num_problems']} held-out problems, temperature 1, the same "
        "problems and noise for every model. Accuracy in training: the mean over all responses that were learned from, "
        "higher for what learns faster. ± is one standard error over seeds; differences are paired by seed."
    )
    if seeds in _T_95:
        text += f" Of {seeds} seeds, a difference beyond {_T_95[seeds]} standard errors has p < 0.05 (t test)."
    return text + " Nothing is corrected for how many differences were looked at."


def _origin_text(results: dict[str, Any]) -> str:
    where, rollouts = results["environment"], results["settings"]["rollouts"]
    seconds, seeds = sum(run["seconds"]["all"] for run in results["runs"]), len(of_method(results, "none"))
    versions = ", ".join(f"{name} {where['versions'][name]}" for name in ("python", "torch", "transformers", "trl"))
    commit = f"{(where['commit'] or 'unknown')[:10]}{' with changes' if where['dirty'] else ''}"
    return (
        f"{where['date'][:10]}, {where['machine']}, {where['threads']} thread, {versions}, commit {commit}; "
        f"{len(results['runs'])} runs took {seconds / 60:.0f} minutes on a machine shared with other work (load "
        f"average {where['load_average_at_start']:.1f} on {where['cores']} cores). Repeat: "
        f"`python -m benchmarks reweighting --rollouts {rollouts} --seeds {seeds}`."
    )


def section(results: dict[str, Any]) -> str:
    """What stands in the README: what was graded on held-out problems, and the lemma."""
    return f"{_table(results, _held_out(results))}\n\n{lemma_text(results)}"


def _runs_table(results: dict[str, Any]) -> list[str]:
    samples = results["settings"]["samples_per_problem"]
    lines = [
        f"| seed | method | avg@{samples} | pass@{samples} | jumps a response | tokens a response | entropy, last "
        "rollout |",
        "|---:|:---|---:|---:|---:|---:|---:|",
    ]
    for run in results["runs"]:
        found = run["evaluation"]
        lines.append(
            f"| {run['seed']} | {NAMES[run['method']]} | {found['avg']:.4f} | {found['pass']:.4f} | "
            f"{found['jumps_per_response']:.3f} | {found['mean_length']:.1f} | {run['curves']['entropy'][-1]:.4f} |"
        )
    return lines


def _value(found: Estimate) -> str:
    return f"{found.mean:.4f}" + ("" if found.standard_error is None else f" ± {found.standard_error:.4f}")


def _signed(found: Estimate) -> str:
    return f"{found.mean:+.4f}" + ("" if found.standard_error is None else f" ± {found.standard_error:.4f}")


def _json(results: dict[str, Any]) -> str:
    """A run a line: a diff shows which."""
    head = {name: value for name, value in results.items() if name != "runs"}
    runs = ",\n".join(json.dumps(run, ensure_ascii=False) for run in results["runs"])
    return json.dumps(head, indent=1, ensure_ascii=False).removesuffix("\n}") + f',\n "runs": [\n{runs}\n]}}'
