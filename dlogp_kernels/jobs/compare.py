"""From two models and a file of problems to responses, numbers, pictures and a page, in one go: `dlogp compare`."""

import html
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

from ..report.figures import Plot, plot
from ..report.responses import BASE, RL
from .allowed import flag_of, options_of
from .decoding import run_sweep
from .errors import JobError
from .graders import EXACT
from .metrics import checked, run_metrics
from .options import Comparing, Decoding, Measuring, Working
from .view import VIEW_FILE, View, run_view
from .workers.engines import check_working

_RESPONSES_DIRECTORY, _METRICS_DIRECTORY, _FIGURES_DIRECTORY = "responses", "metrics", "figures"


class Comparison(NamedTuple):
    """What was drawn (None where responses were given) and measured, as their summaries say; figures, and the page."""

    drawn: Mapping[str, Any] | None
    measured: Mapping[str, Any]
    figures: Plot
    view: View

    def _repr_html_(self) -> str:
        words = html.escape(self.measured.get("words", ""))
        return f"<p>{words}</p>{self.view._repr_html_()}"


def run_compare(
    rl: str | Path,
    base: str | Path,
    out: str | Path,
    *,
    data: str | Path | None = None,
    responses: str | Path | None = None,
    grader: str = EXACT,
    options: Comparing | None = None,
    progress: bool = True,
    **working: Any,
) -> Comparison:
    """Let both models answer problems, measure both at every token of the answers, and draw what was found.

    Args:
        rl, base: directories of the two models, or their names on the Hub.
        out: receives `responses/` (`run_sweep`), `metrics/` (`run_metrics`), `figures/` and `view.html`. Started again
            with the same arguments, what was stopped goes on where it was.
        data: a JSONL file of problems, as `run_generate` takes it.
        responses: instead of `data`, responses that exist, as `run_metrics` takes them.
        grader: of the answers to `data`, as `run_generate` takes it.
        options: of drawing and of measuring, which is at temperature 1 however responses are drawn.
        progress: show progress on stderr.
        working: the fields of `jobs.options.Working`: who draws, and then measures.

    Returns:
        Comparison; in a notebook it shows the page.

    Raises:
        JobError, OSError: as the jobs that it calls, or unless one of `data` and `responses` is given, or for a
            grader or options of drawing beside `responses`.
    """
    options = options or Comparing()
    out = Path(out)
    if (data is None) == (responses is None):
        raise JobError("--data, --responses: expected one of them, problems to answer or responses that exist")
    if responses is not None:
        _refuse_drawing(options, grader)
    # Before responses are drawn, which takes longest.
    kind = check_working(Working(**working), options.device)
    measuring = checked(Measuring(**_of(Measuring, options) | {"temperature": 1.0, "device": kind}))
    drawn = None
    if data is not None:
        responses = out / _RESPONSES_DIRECTORY
        drawn = run_sweep(
            rl, base, data, responses, settings=[BASE, RL], decoding=Decoding(**_of(Decoding, options)), grader=grader,
            progress=progress, command="compare", **working,
        )  # fmt: skip
    assert responses is not None
    metrics = out / _METRICS_DIRECTORY
    try:
        # The device as it was given: where none was, actors may not leave a cluster's GPUs alone.
        how = asdict(measuring) | {"device": options.device} | working
        measured = run_metrics(rl, base, responses, metrics, progress=progress, **how)
    except JobError as error:
        if drawn is not None:
            raise
        # What the other job calls them.
        raise JobError(re.sub("^--data", "--responses", str(error))) from error
    figures = plot(metrics, out / _FIGURES_DIRECTORY)
    return Comparison(drawn, measured, figures, run_view(metrics, out / VIEW_FILE))


def _refuse_drawing(options: Comparing, grader: str) -> None:
    """JobError for what would have no effect on responses that exist."""
    shared = {field.name for field in fields(Measuring)} - {"temperature"}
    flags = {name: flag_of(about.each or name) for name, about in options_of(Decoding).items() if name not in shared}
    given = {flag: (getattr(options, name), getattr(Decoding, name)) for name, flag in flags.items()}
    for flag, (value, default) in (given | {"--grader": (grader, EXACT)}).items():
        if value != default:
            raise JobError(f"{flag} is {value!r}, which has no effect on --responses: leave it out")


def _of(kind: Any, options: Comparing) -> dict[str, Any]:
    """The options of one of the jobs."""
    names = {field.name for field in fields(options)}
    return {field.name: getattr(options, field.name) for field in fields(kind) if field.name in names}
