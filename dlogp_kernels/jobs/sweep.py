"""Responses to a file of problems under a grid of settings: what curves over the replaced share are drawn from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..report.responses import Setting
from .decoding import run_decoding
from .graders import EXACT
from .options import Decoding


def run_sweep(
    rl: str | Path,
    base: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    settings: Sequence[Setting],
    seeds: Sequence[int] = (0,),
    decoding: Decoding | None = None,
    grader: str = EXACT,
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Draw and grade responses to the problems of `data` under each setting with each seed; write them to `out`.

    `settings` come from `jobs.settings.grid`, or from the caller. Everything else is as in `run_generate`; `dlogp plot`
    draws what comes out.
    """
    return run_decoding(
        "sweep", rl, base, data, out, settings=settings, seeds=seeds, decoding=decoding, grader=grader, resume=resume,
        progress=progress,
    )  # fmt: skip
