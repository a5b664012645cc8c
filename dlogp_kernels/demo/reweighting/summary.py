"""What finished runs come to: means over seeds, differences paired by seed, and `reweighting.md`."""

from __future__ import annotations

from typing import Any

import pandas as pd

from ...report.tables import table_lines
from .training import METHODS

NAMES = {"none": "DAPO", "low_prob": "low_prob", "dominate": "dominate", "ppl": "ppl"}
#: |difference ÷ standard error| that 5 % of differences between equals exceed, by the number of seeds.
_T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


def by_seed(results: dict[str, Any], quantity: str) -> pd.DataFrame:
    """A quantity of every run, a row for each seed and a column for each method that has runs.

    `avg` and `pass` are of the evaluation; `training` is the accuracy of all responses that were learned from: how
    fast a run got better.
    """
    rows = [
        (
            run["seed"],
            run["method"],
            pd.Series(run["curves"]["accuracy"]).mean() if quantity == "training" else run["evaluation"][quantity],
        )
        for run in results["runs"]
    ]
    found = pd.DataFrame(rows, columns=["seed", "method", quantity]).pivot(index="seed", columns="method")[quantity]
    return found[[method for method in METHODS if method in found]]


def differences(results: dict[str, Any], method: str, quantity: str) -> pd.Series:
    """To DAPO, of the seeds that both have."""
    values = by_seed(results, quantity)
    return (values[method] - values["none"]).dropna() if {method, "none"} <= {*values} else pd.Series(dtype=float)


def table(results: dict[str, Any]) -> str:
    """A row for each method, ± one standard error over seeds; differences are paired by seed."""
    samples, base = results["settings"]["samples_per_problem"], results["base"]
    quantities = {"avg": f"avg@{samples}", "pass": f"pass@{samples}", "training": "accuracy in training"}
    heads = ["method", "α", "seeds", *(head for name in quantities.values() for head in (name, "minus DAPO"))]
    of_base = (f"{base[name]:.4f}" if name in base else "–" for name in quantities)
    cells = [heads, [":---", *["---:"] * (len(heads) - 1)]]
    cells.append(["base model", "–", "–", *(cell for value in of_base for cell in (value, "–"))])
    values = {name: by_seed(results, name) for name in quantities}
    for method in values["avg"]:
        alpha = METHODS[method]
        row = [NAMES[method], f"{alpha:g}" if alpha else "–", str(values["avg"][method].count())]
        for name in quantities:
            apart = differences(results, method, name)
            row.append(_mean(values[name][method]))
            row.append("–" if method == "none" or apart.empty else _mean(apart, sign="+"))
        cells.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _mean(values: pd.Series, sign: str = "") -> str:
    """Mean, and its standard error where there is more than one value."""
    return f"{values.mean():{sign}.4f}" + (f" ± {values.sem():.4f}" if values.count() > 1 else "")


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
        _runs_table(results),
        lemma_text(results),
        "![accuracy, entropy and length over optimiser steps](reweighting.png)",
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
    chosen, seeds = results["settings"], _num_seeds(results)
    text = (
        f"avg@{chosen['samples_per_problem']} and pass@{chosen['samples_per_problem']}: {chosen['num_problems']} "
        "held-out problems, temperature 1, the same problems and noise for every model. Accuracy in training: the mean "
        "over all responses that were learned from, higher for what learns faster. ± is one standard error over seeds; "
        "differences are paired by seed."
    )
    if seeds in _T_95:
        text += f" Of {seeds} seeds, a difference beyond {_T_95[seeds]} standard errors has p < 0.05 (t test)."
    return text + " Nothing is corrected for how many differences were looked at."


def _origin_text(results: dict[str, Any]) -> str:
    where, rollouts = results["environment"], results["settings"]["rollouts"]
    seconds = sum(run["seconds"]["all"] for run in results["runs"])
    versions = ", ".join(f"{name} {where['versions'][name]}" for name in ("python", "torch", "transformers", "trl"))
    return (
        f"{where['date'][:10]}, {where['machine']}, {where['threads']} thread, {versions}, commit "
        f"{where['commit'] or 'unknown'}; {len(results['runs'])} runs took {seconds / 60:.0f} minutes on a machine "
        f"shared with other work (load average {where['load_average_at_start']:.1f} on {where['cores']} cores). "
        f"Repeat: `python -m dlogp_kernels.demo.reweighting --rollouts {rollouts} --seeds {_num_seeds(results)}`."
    )


def _num_seeds(results: dict[str, Any]) -> int:
    return len({run["seed"] for run in results["runs"]})


def _runs_table(results: dict[str, Any]) -> str:
    samples = results["settings"]["samples_per_problem"]
    head = ["seed", "method", f"avg@{samples}", f"pass@{samples}", "jumps a response", "tokens a response"]
    rows = []
    for run in results["runs"]:
        found, entropy = run["evaluation"], run["curves"]["entropy"][-1]
        cells = f"{found['avg']:.4f}", f"{found['pass']:.4f}", f"{found['jumps_per_response']:.3f}"
        rows.append((run["seed"], NAMES[run["method"]], *cells, f"{found['mean_length']:.1f}", f"{entropy:.4f}"))
    return "\n".join(table_lines([*head, "entropy, last rollout"], "rlrrrrr", rows))
