"""What is shown on stderr while a job runs."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from tqdm import tqdm

from ..report.text import printable

#: Called with how many layers of the models a forward pass has run, and how many there are.
OnLayer = Callable[[int, int], object]


def note(text: str) -> None:
    """A line above the bars."""
    tqdm.write(printable(text), sys.stderr)


def bar(*, enabled: bool, **options: Any) -> tqdm:
    """A bar of progress, drawn ten times a second at most, and also where only the text behind it has changed."""
    return tqdm(dynamic_ncols=True, miniters=0, disable=not enabled, **options)


def say(shown: tqdm, text: str, done: int = 0) -> None:
    """Move a bar, and put a text behind it."""
    shown.set_postfix_str(text, refresh=False)
    shown.update(done)


def show_layer(shown: tqdm, done: int, total: int) -> None:
    """Behind a bar, how far the models are with what has not moved it yet."""
    say(shown, f"layer {done}/{total}")


@contextmanager
def layers_told(models: Sequence[Any], on_layer: OnLayer) -> Iterator[Callable[[], None]]:
    """Within this context, or until the function that it gives is called, `on_layer` hears of each layer that ran."""
    layers = [layer for model in {id(model): model for model in models}.values() for layer in _layers(model)]
    done = 0

    def count(*_: object) -> None:
        nonlocal done
        done = done % len(layers) + 1
        on_layer(done, len(layers))

    handles = [layer.register_forward_hook(count) for layer in layers]

    def stop() -> None:
        while handles:
            handles.pop().remove()

    try:
        yield stop
    finally:
        stop()


def _layers(model: Any) -> Sequence[nn.Module]:
    """The blocks of a model: its outermost list of modules; none where it has no list, or is a last layer alone."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return list(next((module for module in modules if isinstance(module, nn.ModuleList)), ()))
