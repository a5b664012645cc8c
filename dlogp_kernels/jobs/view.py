"""One page of what a run drew or measured: `dlogp view`."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..report.dataset import SUMMARY_FILE, TOKENS_DIRECTORY, UNFINISHED, ResponseRows, TokenDataset, hint_below
from ..report.errors import DatasetError
from ..report.files import write_atomically
from ..report.ledger import MANIFEST_FILE, read_manifest
from ..report.responses import RESPONSES_FILE, Response, read_responses
from ..report.text import counted, one_line
from ..report.view import MAX_TOKENS
from ..report.view.page import NUMBERS, OF_DRAFTS, Number, render, unknown_tokens
from ..report.view.reading import Chosen, choose, read_dataset
from .allowed import check_value, integer
from .errors import JobError, explained_writes
from .token_text import TokenTexts

VIEW_FILE = "view.html"
_MOST_NOTEBOOK_BYTES = 8 * 2**20


class View(NamedTuple):
    """The page that was written, and what it says of itself."""

    path: Path
    subtitle: str
    remarks: list[str]

    def _repr_html_(self) -> str:
        """In a notebook the page itself; where it lies, of one that is too large to be kept in a notebook."""
        if self.path.stat().st_size > _MOST_NOTEBOOK_BYTES:
            return f"<p>{html.escape(one_line(f'{self.subtitle}: {self.path}'))}</p>"
        page = html.escape(self.path.read_text(encoding="utf-8"))
        return f'<iframe srcdoc="{page}" style="border: 0; height: 40rem; width: 100%"></iframe>'


def run_view(
    directory: str | Path,
    out: str | Path | None = None,
    *,
    tokenizer: str | Path | None = None,
    max_tokens: int = MAX_TOKENS,
) -> View:
    """Write a page of the responses in `directory`, which needs nothing but itself.

    Args:
        directory: what `dlogp metrics`, `generate` or `sweep` wrote.
        out: the file; `directory/view.html` unless given.
        tokenizer: directory or name of the tokenizer that gives tokens their text where files tell their ids alone;
            that of the run's models, where these still are, unless given.
        max_tokens: of responses with more tokens a sample of whole ones is shown, the same in every run.

    Returns:
        View: where the page lies, and what is to be known about it: that the run is not complete, that it is a sample.

    Raises:
        JobError: there is no tokenizer for what `generate` or `sweep` drew, or another one than it was drawn with, or
            `out` is not writable, or an argument can not be.
        DatasetError: `directory` holds nothing to show, or files that are not what the run wrote.
    """
    directory = Path(directory)
    check_value(integer(1, 2**31), "--max-tokens", max_tokens)
    path = directory / VIEW_FILE if out is None else Path(out)
    if path.is_dir():
        raise JobError(f"--out {path}: it is a directory, expected a file")
    find = _FindTexts(directory, tokenizer)
    numbers: Sequence[Number] = NUMBERS
    texts: dict[int, str] = {}
    if (directory / TOKENS_DIRECTORY).is_dir():
        rows, chosen = read_dataset(TokenDataset(directory), max_tokens)
        texts, remarks = _texts_of(unknown_tokens(rows), find)
    elif (directory / RESPONSES_FILE).is_file():
        numbers = OF_DRAFTS
        rows, chosen = _read_drawn(directory, find(), max_tokens)
        remarks = ["Only tokens that were replaced have numbers: `dlogp metrics` measures all of them."]
    else:
        hint = hint_below(directory, TOKENS_DIRECTORY, RESPONSES_FILE)
        raise DatasetError(
            f"{directory} holds nothing to show: expected {TOKENS_DIRECTORY}/ or {RESPONSES_FILE} in it, as "
            f"`dlogp metrics`, `generate` and `sweep` write them{hint}"
        )
    if not (directory / SUMMARY_FILE).exists():
        remarks.append(UNFINISHED)
    if (sample := chosen.remark()) is not None:
        remarks.append(sample)
    title = "/".join(directory.resolve().parts[-2:])
    subtitle = f"{counted(len(rows), 'response')}, {counted(chosen.tokens, 'token')}"
    page = render(rows, title=title, subtitle=subtitle, remarks=remarks, numbers=numbers, texts=texts)
    with explained_writes(path, "choose another file"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, page.encode())
    return View(path, subtitle, remarks)


class _FindTexts:
    """Finds the tokenizer of a run when it is asked to."""

    def __init__(self, directory: Path, given: str | Path | None) -> None:
        self._directory, self._given = directory, given

    def __call__(self) -> TokenTexts:
        """JobError if it can not be loaded."""
        place = self._given if self._given is not None else self._of_run()
        if place is None:
            raise JobError(f"{self._directory} does not say which tokenizer its tokens are of: give --tokenizer DIR")
        # It takes seconds to load, and a data set mostly tells its texts itself.
        from ..hf import load_tokenizer

        try:
            return TokenTexts(load_tokenizer(place))
        except (OSError, ValueError, ImportError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise JobError(f"the tokenizer in {place} can not be loaded: {reason}; give --tokenizer DIR") from error

    def _of_run(self) -> str | Path | None:
        """Where the manifest says that a model lies; both have the same tokenizer."""
        try:
            manifest = read_manifest(self._directory / MANIFEST_FILE)
        except (OSError, ValueError):
            return None
        name = manifest.get("identity", {}).get("rl", {}).get("hub_name")
        files = (Path(file) for file in manifest.get("stamps", {}))
        return name or next((file.parent for file in files if file.name.startswith("tokenizer")), None)


def _texts_of(ids: np.ndarray, find: _FindTexts) -> tuple[dict[int, str], list[str]]:
    """The texts of tokens by id; none, and a remark, where there is no tokenizer."""
    if not len(ids):
        return {}, []
    try:
        return dict(zip(ids.tolist(), find()(ids), strict=True)), []
    except JobError as error:
        return {}, [f"Where no response has a model's most likely token, it is shown as its number: {error}"]


def _read_drawn(directory: Path, texts: TokenTexts, max_tokens: int) -> tuple[list[ResponseRows], Chosen]:
    """The chosen responses of `generate` or `sweep`, with the numbers of their replaced tokens."""
    about = [(one.problem, len(one.token_ids), one.sample, one.seed) for one in read_responses(directory)]
    if not about:
        raise DatasetError(f"{directory} holds no responses")
    problems, lengths, samples, seeds = zip(*about, strict=True)
    chosen = choose(problems, lengths, max_tokens)
    shown = set(chosen.indices)
    # Numbers stand in the name where they tell responses to a problem apart.
    name = "{0.problem_id}" + " #{0.sample}" * (len(set(samples)) > 1) + ", seed {0.seed}" * (len(set(seeds)) > 1)
    lines = enumerate(read_responses(directory), 1)
    return [_drawn_rows(one, line, name.format(one), texts) for line, one in lines if line - 1 in shown], chosen


def _drawn_rows(response: Response, line: int, name: str, texts: TokenTexts) -> ResponseRows:
    """A response with Δlog p of its drafts."""
    ids, prompt_ids = np.asarray(response.token_ids, np.int64), np.asarray(response.prompt_ids, np.int64)
    token_texts = texts(ids)
    if [token_texts[place] for place in response.selected] != list(response.new_texts):
        raise JobError(
            f"{RESPONSES_FILE}: line {line}: the tokenizer gives its tokens other texts than when they were drawn: "
            "give that of the run with --tokenizer DIR"
        )
    delta_logp = np.full(len(ids), np.nan, np.float32)
    delta_logp[list(response.selected)] = response.delta_logp
    return ResponseRows(
        name,
        line,
        response.setting.source,
        ids,
        token_texts,
        {"delta_logp": delta_logp},
        texts.joined(prompt_ids) if len(prompt_ids) else None,
        # Of earlier versions no tokens, and then the problem tells prompts apart.
        prompt_ids if len(prompt_ids) else [response.problem],
        response.score,
        response.finished,
        response.replaced,
    )
