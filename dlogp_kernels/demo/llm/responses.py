"""Responses of the demo's models to held-out word problems, as `dlogp generate` draws and grades them."""

import json
from pathlib import Path

from ...jobs.decoding import run_generate
from ...jobs.options import Decoding
from ...report.responses import RESPONSES_FILE, Estimate, Setting
from ..generate import write_jsonl
from .word_problems import MAX_RESPONSE_TOKENS, Split, generate_problems, grade

#: As `dlogp` takes it.
GRADER = f"{grade.__module__}:{grade.__name__}"
#: Each model alone, and the base model that asks the RL model where that would not have said so.
SETTINGS = {"base": Setting("none"), "rl": Setting("none", draft="rl"), "both": Setting("delta_logp", -0.5)}


def write_problems(path: Path, count: int, seed: int, split: Split) -> None:
    """Write problems as `dlogp train` and `dlogp generate` read them."""
    problems = generate_problems(count, seed, split)
    write_jsonl(path, ({"messages": problem.messages, "answer": problem.answer} for problem in problems))


def respond(rl: Path, base: Path, data: Path, out: Path, setting: Setting, seed: int) -> Estimate:
    """Draw a response to each problem of `data`, write them below `out`, and grade them: the accuracy."""
    decoding = Decoding(max_new_tokens=MAX_RESPONSE_TOKENS, dtype="fp32", device="cpu")
    found = run_generate(rl, base, data, out, setting=setting, seed=seed, decoding=decoding, grader=GRADER)
    (result,) = found["settings"]
    return Estimate(result["accuracy"], result["accuracy_standard_error"])


def joined(directories: list[Path], path: Path) -> None:
    """Write the responses of several runs to one file, which `dlogp metrics` reads, with ids of their own."""
    rows = (
        (directory.name, json.loads(line))
        for directory in directories
        for line in (directory / RESPONSES_FILE).read_text(encoding="utf-8").splitlines()
    )
    write_jsonl(path, (row | {"id": f"{name}-{row['id']}"} for name, row in rows))
