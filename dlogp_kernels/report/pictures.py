"""What all pictures share: colours, axes, how their files are made, and where they go."""

import io
from collections.abc import Iterator, Mapping
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from .files import write_atomically
from .text import printable

FIGURES_DIRECTORY = "figures"

#: Okabe and Ito's palette, told apart by colour-blind readers; the order puts the clearest pair first.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000")
_LINES = ("-", "--", "-.", ":")


def style(index: int) -> tuple[str, str]:
    """Colour and dashes of a line; 24 are told apart."""
    return PALETTE[index % len(PALETTE)], _LINES[index // len(PALETTE) % len(_LINES)]


def tidy(axes: Axes, title: str, x: str, y: str) -> None:
    """A title, names of the axes, a grid behind what is drawn, and no frame."""
    axes.set_title(title, fontsize=13)
    axes.set_xlabel(x, fontsize=12)
    axes.set_ylabel(y, fontsize=12)
    axes.tick_params(labelsize=11)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def panels(count: int, columns: int, size: tuple[float, float], *, share: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure of as many axes in rows of so many, `size` inches each; `share`: with the same limits."""
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = Figure(figsize=(columns * size[0], rows * size[1] + 0.5), layout="constrained")
    axes = [figure.add_subplot(rows, columns, 1)]
    shared = axes[0] if share else None
    axes += [figure.add_subplot(rows, columns, number, sharex=shared, sharey=shared) for number in range(2, count + 1)]
    return figure, axes


def legend_above(figure: Figure, remark: str = "") -> None:
    """One legend, of what the first axes show, with a remark above it; as many columns as there is room for."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    size = 11 if len(labels) <= 4 else 10
    # A letter is about .6 of its size wide, at 72 points an inch; before it stands what it explains.
    widest = 0.6 * size / 72 * max(map(len, labels)) + 0.7
    columns = min(max(int(figure.get_figwidth() / widest), 1), len(labels))
    figure.legend(
        handles, labels, loc="outside upper center", ncols=columns, title=remark or None, fontsize=size, frameon=False
    )


def as_text(figure: Figure) -> Figure:
    """The same figure; its texts are text, not formulas."""
    for text in _texts(figure):
        text.set_parse_math(False)
        text.set_text(printable(text.get_text()))
    return figure


def render(figure: Figure, kind: str) -> bytes:
    """The file of a picture, of the kind "png" or "svg", `as_text`."""
    buffer = io.BytesIO()
    # Without the date and random ids the same data give the same file.
    with rc_context({"svg.hashsalt": "dlogp"}):
        as_text(figure).savefig(buffer, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)
    # What has found its places keeps them in the file of another kind: that takes as long as drawing.
    figure.set_layout_engine("none")
    return buffer.getvalue()


def _texts(figure: Figure) -> Iterator[Text]:
    """All but the numbers of axes, which are formulas on a logarithmic one."""
    yield from figure.texts
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes)]
    for legend in legends:
        if legend is not None:
            yield from (*legend.get_texts(), legend.get_title())
    for axes in figure.axes:
        yield from (*axes.texts, axes.title, axes.xaxis.label, axes.yaxis.label)


def write_figures(directory: str | Path, out: str | Path | None, contents: Mapping[str, bytes | str]) -> list[Path]:
    """Write files by name into `out`, or else into the figures of `directory`; OSError if that can not be."""
    target = Path(out) if out is not None else Path(directory) / FIGURES_DIRECTORY
    target.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_atomically(target / name, content.encode() if isinstance(content, str) else content)
    return [target / name for name in contents]
