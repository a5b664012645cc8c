"""A process that does cases one after the other: `python -m benchmarks.gpu.child`, driven by `children.py`.

The request is its argument, as JSON; one line of JSON on stdout for every step begun, every entry and every case done.
When stdin ends, so does the process: a visit that was killed leaves nothing running.
"""

import importlib
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TextIO

import torch

from ..timing import NotMeasuredError, WrongResultError

Entry = dict[str, Any]


class Case(NamedTuple):
    """`run()` yields an entry for each thing that it looked at: {} says that it passed."""

    name: str
    run: Callable[[], Iterable[Entry]]


@dataclass
class Session:
    """What the cases of a process are told; `case` and `watch(step)` say what runs now."""

    device: torch.device
    tiny: bool = False
    #: Compile only: every candidate once, of few rows.
    prewarm: bool = False
    #: Which of several sets of cases.
    group: str = ""
    #: Case → candidates that ended a process.
    excluded: dict[str, list[str]] = field(default_factory=dict)
    watch: Callable[[str], None] = lambda step: None
    case: str = ""

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


def failure(error: BaseException) -> Entry:
    """The fields of an entry that say what went wrong."""
    if isinstance(error, NotMeasuredError) and not isinstance(error, WrongResultError):
        return {"status": "skipped", "error": str(error)}
    message = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return {"status": "failed", "error": message, "traceback": "".join(traceback.format_exception(error))}


def usable(device: torch.device) -> bool:
    """Whether the device still answers. After an illegal memory access, for example, it does not, in this process."""
    try:
        return torch.ones(1, device=device).add_(1).item() == 2.0
    except RuntimeError:
        return False


def main() -> None:
    request = json.loads(sys.argv[1])
    # What libraries print must not come between the lines.
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
    _serve(request, events)
    # Not by way of destructors, which may wait for a lost device.
    os._exit(0)


def _serve(request: dict[str, Any], events: TextIO) -> None:
    """Cases of the request's `module:function` that are not done; every n-th one where its `share` is (i, n)."""

    def send(**event: Any) -> None:
        events.write(json.dumps(event) + "\n")

    known = {name: request[name] for name in ("tiny", "prewarm", "group", "excluded") if name in request}
    session = Session(torch.device(request["device"]), **known, watch=lambda step: send(at=[session.case, step]))
    session.watch("import")
    module, name = request["cases"].split(":")
    cases = getattr(importlib.import_module(module), name)(session)
    first, step = request.get("share", (0, 1))
    for case in (case for case in cases[first::step] if case.name not in request["done"]):
        session.case = case.name
        session.watch("")
        try:
            for entry in case.run():
                send(entry={"status": "passed", **entry, "case": case.name})
        except Exception as error:
            send(entry={**failure(error), "case": case.name})
        if not usable(session.device):
            send(lost=True)
            return
        send(done=case.name)
        if session.on_gpu:
            # What is kept for tensors of this case's sizes is in the way of the next one's.
            torch.cuda.empty_cache()
    send(end=True)


if __name__ == "__main__":
    main()
