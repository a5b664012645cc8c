"""The program `dlogp`: its commands, what a user sees of warnings and errors, and its exit status.

Heavy modules are imported by the command that needs them.
"""

import io
import logging
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NoReturn

import typer

from ..jobs.errors import JobError
from ..report.errors import DatasetError
from ..report.terminal import Terminal
from ..report.text import printable
from .command import Command
from .compare import compare
from .demo import demo
from .doctor import doctor
from .generate import generate
from .metrics import metrics
from .plot import plot
from .sweep import sweep
from .train import train
from .view import view

app = typer.Typer(
    help="Token log-probabilities of an RL model and its base: train one, measure a pair, sample from it, plot it all.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _command in (compare, metrics, generate, sweep, train, plot, view, doctor, demo):
    app.command(cls=Command)(_command)

_errors = Terminal(stderr=True)


@contextmanager
def _readable() -> Iterator[None]:
    """Within this context warnings and logs go through `_errors`' eyes, and no character is too much for the terminal.

    A warning for users is one line, without the place in the code.
    """
    record = logging.getLogRecordFactory()
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning  # type: ignore[assignment]
        logging.setLogRecordFactory(_PrintableRecord)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            yield
        finally:
            logging.setLogRecordFactory(record)


def _show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
    shown = f"warning: {message}"
    if category is not UserWarning:
        shown = warnings.formatwarning(message, category, filename, lineno).rstrip()
    _errors.print(shown, style="yellow")


class _PrintableRecord(logging.LogRecord):
    """A log of a library, which may quote what files say."""

    def getMessage(self) -> str:
        return printable(super().getMessage())


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    _errors.print("".join(traceback.format_exception(kind, error, trace)).rstrip())


def run() -> None:
    """Run the command of `sys.argv`; errors that a user can do something about are one message and status 1."""
    with _readable():
        # For a fault of ours: Python shows where. To call `app` would set the hook of typer.
        sys.excepthook = _show_traceback
        try:
            typer.main.get_command(app)()
        except (JobError, DatasetError) as error:
            _fail(str(error))
        except OSError as error:
            _fail(": ".join(str(part) for part in (error.filename, error.strerror or error) if part))
        except MemoryError:
            _fail("the memory is full: give a smaller --batch-tokens or --batch-size")


def _fail(message: str) -> NoReturn:
    _errors.print(f"error: {message}", style="red")
    sys.exit(1)
