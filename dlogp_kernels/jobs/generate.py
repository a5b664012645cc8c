"""Responses to a file of problems under one setting of extrapolated sampling, graded; resumable."""

from pathlib import Path
from typing import Any

from ..report.responses import Setting
from .decoding import run_decoding
from .graders import EXACT
from .options import Decoding


def run_generate(
    rl: str | Path,
    base: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    setting: Setting,
    seed: int = 0,
    decoding: Decoding | None = None,
    grader: str = EXACT,
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Draw and grade responses to the problems of `data` and write them to the directory `out`.

    Args:
        rl, base: directories of the two models, or their names on the Hub; safetensors only.
        data: a JSONL file; its columns are described in `jobs.inputs.problems`.
        out: receives `responses.jsonl` (`report.responses`), `manifest.json` and `summary.json`. Where it holds a run
            of the same arguments, data and models, that run goes on, or nothing is done if it is complete; a run of
            others is an error, and stays as it is.
        setting: when a token of the draft is replaced, and from what.
        seed: of the noise, 64 bits. Runs of one seed share their noise: their accuracies can be compared in pairs.
        decoding: temperature and filters, samples, lengths, batches, device.
        grader: `exact`, `math-verify` or `module:function`, see `jobs.graders`. One that raises, ends its process or
            takes longer than `decoding.grader_timeout` is counted, and the reason is kept with the response.
        resume: insist that `out` holds a run to go on with; without it a new run may begin.
        progress: show progress on stderr.

    Returns:
        What `summary.json` holds: accuracy and replaced share with standard errors over problems, lengths, tokens,
        errors of the grader.

    Raises:
        JobError: an argument, the data, a model or the directory can not be used, or the disk is full. UserWarning: a
            threshold of `delta_logp` that is not below 0.
    """
    return run_decoding(
        "generate", rl, base, data, out, settings=[setting], seeds=[seed], decoding=decoding, grader=grader,
        resume=resume, progress=progress,
    )  # fmt: skip
