"""Pictures of a data set of token statistics: what they show is what the data say, whatever the data are."""

import json
import xml.etree.ElementTree as ElementTree
from io import StringIO
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("matplotlib")

import matplotlib.image
from dataset_files import token_rows, write_dataset

from dlogp_kernels.cli.tables import _class_table
from dlogp_kernels.report import figures
from dlogp_kernels.report.classes import class_changes, draw_classes, read_classes
from dlogp_kernels.report.dataset import STATISTICS, TokenDataset
from dlogp_kernels.report.errors import DatasetError
from dlogp_kernels.report.figures import draw_gradient_mass, draw_positions, draw_probabilities, plot
from dlogp_kernels.report.histograms import _ALL_PANELS, _PANELS, draw_histograms, histograms
from dlogp_kernels.report.pictures import render
from dlogp_kernels.report.terminal import Terminal

PICTURES = ("histograms", "all_histograms", "probabilities", "gradient_mass", "positions", "token_classes")


def write_random(directory: Path, sources=("rl", "base"), count=4000) -> Path:
    rng = np.random.default_rng(0)
    parts = []
    for index, source in enumerate(sources):
        values = {name: rng.gamma(0.5, 1.0, count) for name in STATISTICS}
        values |= {name: -values[name] for name in ("logp", "base_logp")}
        center, width = (0.3, 0.5) if source == "rl" else (-0.3, 1.5)
        values["delta_logp"] = rng.laplace(center, width, count)
        ids = rng.integers(0, 30, count)
        parts.append([token_rows(source, ids, [f"t{token}" for token in ids], index + 1, **values)])
    return write_dataset(directory, *parts)


def test_histograms_are_densities_over_all_tokens(tmp_path):
    dataset = TokenDataset(write_random(tmp_path))
    for panel, drawn in zip(_ALL_PANELS, histograms(dataset, _ALL_PANELS), strict=True):
        assert [histogram.source for histogram in drawn] == ["rl", "base"]
        for histogram in drawn:
            values = np.mean([dataset.column(name, histogram.source) for name in panel.columns], axis=0)
            mass = histogram.density * np.diff(histogram.edges)
            assert mass.sum() == pytest.approx(1 - histogram.num_beyond / len(values))
            assert histogram.num_beyond <= 5
            low, high = histogram.edges[10], histogram.edges[15]
            assert mass[10:15].sum() == pytest.approx(((values >= low) & (values < high)).mean(), abs=1e-6)
            if panel.sign != "±":
                assert histogram.edges[0 if panel.sign == "+" else -1] == 0
                assert panel.sign == ("−" if "log p" in panel.label else "+")
            else:
                # No bin ends at 0, next to which most tokens lie on one side by rounding alone.
                width = histogram.edges[1] - histogram.edges[0]
                assert np.abs(histogram.edges).min() == pytest.approx(width / 2)
    columns = {name for panel in _ALL_PANELS for name in panel.columns}
    assert columns == set(STATISTICS) - {"lse", "base_lse"}
    assert [panel.columns for panel in _PANELS] == [("entropy",), ("kl",), ("delta_logp",)]


def ink(png: Path) -> np.ndarray:
    """The colours of a picture that are neither white nor grey, as rows of (red, green, blue) in 0…1."""
    pixels = matplotlib.image.imread(png)[..., :3].reshape(-1, 3)
    return pixels[np.ptp(pixels, axis=1) > 0.3]


def test_plot_writes_tables_and_every_picture_twice(tmp_path):
    directory = write_random(tmp_path / "run")
    result = plot(directory)
    pictures = [f"{name}.{kind}" for name in PICTURES for kind in ("png", "svg")]
    assert [file.name for file in result.files] == ["top_tokens.md", "top_tokens.csv", *pictures]
    assert {file.parent for file in result.files} == {directory / "figures"} and not result.complete
    colours = ink(directory / "figures" / "histograms.png")
    blue, vermilion = (
        np.abs(colours - np.array(rgb) / 255).max(axis=1) < 0.02 for rgb in ((0, 114, 178), (213, 94, 0))
    )
    assert blue.sum() > 1000 and vermilion.sum() > 1000
    for name in PICTURES:
        root = ElementTree.parse(directory / "figures" / f"{name}.svg").getroot()
        assert root.tag.endswith("svg") and len(list(root.iter("{http://www.w3.org/2000/svg}path"))) > 20


def test_an_empty_data_set_has_no_pictures(tmp_path):
    empty = write_dataset(tmp_path, [])
    for draw in (plot, *(getattr(figures, name) for name in figures.__all__ if name.startswith("draw_"))):
        with pytest.raises(DatasetError, match="holds no tokens"):
            draw(empty if draw is plot else TokenDataset(empty))


def test_the_same_data_give_the_same_files(tmp_path):
    dataset = TokenDataset(write_random(tmp_path, sources=(None,)))
    assert {name for name in figures.__all__ if name.startswith("draw_")} == {
        "draw_histograms", "draw_all_histograms", "draw_probabilities", "draw_gradient_mass", "draw_positions",
        "draw_classes",
    }  # fmt: skip
    one, two = (render(draw_gradient_mass(dataset), "svg") for _ in range(2))
    assert one == two
    (tmp_path / "one.png").write_bytes(render(draw_histograms(dataset), "png"))
    colours = ink(tmp_path / "one.png")
    assert len(colours) > 1000
    assert (np.abs(colours - np.array((213, 94, 0)) / 255).max(axis=1) < 0.02).sum() == 0


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_labels_take_names_of_sources_as_they_are(tmp_path):
    dataset = TokenDataset(write_random(tmp_path, sources=("rl", "base", "_$x$ \n\x1b", None), count=40))
    figure = draw_histograms(dataset)
    assert legend(figure) == [
        "RL responses (40 tokens)",
        "base responses (40 tokens)",
        "“_$x$ \\n\\x1b” responses (40 tokens)",
        "responses (40 tokens)",
    ]
    assert not any(text.get_parse_math() for text in figure.legends[0].get_texts())
    titles = [axes.get_title() for axes in draw_positions(dataset).axes]
    assert titles[2] == "“_$x$ \\n\\x1b” responses (40 tokens)"
    # As a notebook does it: without `render`.
    draw_classes(dataset, read_classes()).savefig(tmp_path / "classes.png")


def test_of_many_sources_the_largest_are_drawn_and_it_is_said(tmp_path):
    parts = [
        [token_rows(str(k), [1] * (k + 1), ["so"] * (k + 1), k + 1, delta_logp=[0.5] * (k + 1))] for k in range(13)
    ]
    dataset = TokenDataset(write_dataset(tmp_path, *parts))
    for draw in (draw_histograms, draw_probabilities, draw_gradient_mass, draw_positions):
        assert draw(dataset).legends[0].get_title().get_text() == "the 12 largest of 13 sources"
    assert len(draw_positions(dataset).axes) == 12
    assert len(legend(draw_histograms(dataset))) == 12 and "“0” responses (1 token)" not in legend(
        draw_histograms(dataset)
    )
    assert legend(draw_classes(dataset)) == [f"“{k}” responses" for k in (10, 11, 12, 9)]
    (terminal := Terminal(file=StringIO(), width=200)).print(_class_table(class_changes(dataset)))
    assert "Classes of tokens; the 4 largest of 13 sources; share of Σ|Δlog p|" in terminal.file.getvalue()


def test_equal_means_of_both_divergences_are_within_their_axis(tmp_path):
    rows = token_rows("rl", range(50), ["x"] * 50, kl=[0.1] * 50, reverse_kl=[0.3] * 50)
    ((histogram,),) = histograms(TokenDataset(write_dataset(tmp_path, [rows])), _ALL_PANELS[-1:])
    assert histogram.num_beyond == 0 and histogram.density[-1] > 0


ODD = {
    "zero": [0.0],
    "infinite": [np.inf],
    "nan": [np.nan, 1.0],
    "only nan": [np.nan],
    "one value": [-5.0],
    "tiny": [1e-9],
}


@pytest.mark.parametrize("values", ODD.values(), ids=ODD)
def test_pictures_of_odd_values(tmp_path, values):
    rows = token_rows(
        "rl", [1] * len(values), ["x"] * len(values), kl=np.abs(values), delta_logp=values, logp=[-np.inf] * len(values)
    )
    dataset = TokenDataset(write_dataset(tmp_path, [rows]))
    for name in figures.__all__:
        # Of all histograms three are enough: layout takes its time.
        if name.startswith("draw_") and name != "draw_all_histograms":
            figure = getattr(figures, name)(dataset)
            figure.draw_without_rendering()
            assert figure.axes


def test_axes_count_in_words(tmp_path):
    """Two values far out among 200,000: as many as that are beyond the axis."""
    values = np.zeros(200_000)
    values[:4], values[4] = 5.0, 9.0
    dataset = TokenDataset(
        write_dataset(tmp_path, [token_rows("rl", np.ones(len(values)), ["x"] * len(values), kl=values)])
    )
    assert draw_histograms(dataset).axes[1].get_xlabel() == "KL divergence [nats], 1 token beyond"


def bars(figure, panel: int) -> dict[str, list[float]]:
    return {group.get_label(): [bar.get_height() for bar in group] for group in figure.axes[panel].containers}


def test_gradient_mass_is_that_of_the_lemma(tmp_path):
    """Of π = .05, .05, .95 the mass is 1 − π: .95, .95, .05; of the base's responses π is the base model's."""
    logp, other = np.log([0.05, 0.05, 0.95]), np.log([0.55, 0.55, 0.55])
    delta_logp = [1.0, -2.0, 1.0]
    parts = [
        [token_rows("rl", [1, 2, 3], "abc", 1, delta_logp=delta_logp, logp=logp, base_logp=other)],
        [token_rows("base", [1, 2, 3], "abc", 2, delta_logp=delta_logp, logp=other, base_logp=logp)],
    ]
    figure = draw_gradient_mass(TokenDataset(write_dataset(tmp_path, *parts)))
    for panel in range(2):
        found = bars(figure, panel)
        assert [found["share of tokens"][k] for k in (0, 9)] == pytest.approx([2 / 3, 1 / 3])
        assert [found["share of gradient mass"][k] for k in (0, 9)] == pytest.approx([1.9 / 1.95, 0.05 / 1.95])
        assert [found["share of Σ|Δlog p|"][k] for k in (0, 9)] == pytest.approx([0.75, 0.25])


def test_probabilities_and_positions_are_means_and_quantiles_of_their_bins(tmp_path):
    rng = np.random.default_rng(1)
    delta_logp, logp, base_logp = rng.normal(0, 1, 800), -rng.gamma(1, 1, 800), -rng.gamma(2, 1, 800)
    # In two parts, which are read one after the other. What lies beyond 99.5 % of the positions is not drawn.
    columns = {"delta_logp": delta_logp, "logp": logp, "base_logp": base_logp}
    beyond = {"delta_logp": [50.0] * 3, "logp": [-np.inf] * 3, "base_logp": [0.0] * 3}
    halves = [
        {name: values[:400] for name, values in columns.items()},
        {name: np.append(values[400:], beyond[name]) for name, values in columns.items()},
    ]
    rows = [
        token_rows("rl", range(length), ["x"] * length, line, **half)
        for line, (length, half) in enumerate(zip((400, 403), halves, strict=True))
    ]
    dataset = TokenDataset(write_dataset(tmp_path, rows[:1], rows[1:]))
    axes = draw_probabilities(dataset).axes[0]
    drawn = {
        tuple(np.round(line.get_xdata(), 2)): line.get_ydata()[0] for line in axes.lines if len(line.get_xdata()) == 1
    }
    bars = {round(bar.get_segments()[0][0, 0], 2): bar.get_segments()[0][:, 1] for bar in axes.collections}
    inside = (delta_logp > 0.2) & (delta_logp < 0.5)
    assert drawn[(6.85,)] == pytest.approx(np.exp(logp[inside]).mean(), abs=1e-6)
    assert drawn[(7.15,)] == pytest.approx(np.exp(base_logp[inside]).mean(), abs=1e-6)
    assert bars[6.85] == pytest.approx(np.quantile(np.exp(logp[inside]), (0.25, 0.75)), abs=1e-6)
    assert bars[7.15] == pytest.approx(np.quantile(np.exp(base_logp[inside]), (0.25, 0.75)), abs=1e-6)
    assert drawn[(9.85,)] == pytest.approx(np.exp(logp[delta_logp > 2]).mean(), abs=1e-6)
    axes = draw_positions(dataset).axes[0]
    mean = axes.lines[0]
    # Bins of 10 begin at 0.
    assert mean.get_xdata()[[0, 1, -1]].tolist() == [4.5, 14.5, 394.5]
    assert mean.get_ydata()[-1] == pytest.approx(delta_logp.reshape(2, -1)[:, 390:].mean(), abs=1e-6)
    assert mean.get_ydata()[1] == pytest.approx(delta_logp.reshape(2, -1)[:, 10:20].mean(), abs=1e-6)
    outer, inner = (band.get_paths()[0].vertices for band in axes.collections)
    for band, quantiles in ((outer, (0.01, 0.99)), (inner, (0.05, 0.95))):
        ends = band[np.isclose(band[:, 0], 14.5)][:, 1]
        assert sorted(set(ends)) == pytest.approx(np.quantile(delta_logp.reshape(2, -1)[:, 10:20], quantiles), abs=1e-6)


def test_classes_are_what_the_file_says(tmp_path):
    texts = [" Wait", "wait", "12", " 3.5", "\n", "waiter", " so", "7"]
    deltas = [1.0, -3.0, 0.5, 0.5, np.nan, 2.0, 1.0, np.nan]
    dataset = TokenDataset(write_dataset(tmp_path / "data", [token_rows("rl", range(8), texts, delta_logp=deltas)]))
    file = tmp_path / "classes.json"
    file.write_text(json.dumps({"numbers": [r"\d+(\.\d+)?"], "so or wait": ["wait", "so"], "ends of lines": [r"\\n"]}))
    found = {change.name: change for change in class_changes(dataset, read_classes(file)).changes}
    assert {name: change.occurrences for name, change in found.items()} == {
        "numbers": 3,
        "so or wait": 3,
        "ends of lines": 1,
        "other tokens": 1,
    }
    assert found["numbers"].delta_logp == 0.5 and found["numbers"].share == pytest.approx(1 / 8)
    assert found["so or wait"].delta_logp == pytest.approx(-1 / 3) and found["so or wait"].share == pytest.approx(5 / 8)
    assert np.isnan(found["ends of lines"].delta_logp) and found["ends of lines"].share == 0
    default = {change.name: change.occurrences for change in class_changes(dataset).changes}
    assert default == {"numbers": 3, "connectives": 1, "reflection": 2, "other tokens": 2}
    labels = draw_classes(dataset, read_classes(file)).axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == list(found)


NO_CLASSES = {
    "[": "can not be read as JSON",
    "[]": "expected a JSON object",
    "{}": "expected a JSON object",
    '{"a": "wait"}': "expected a JSON object",
    '{"a": []}': "expected a JSON object",
    '{"a": [3]}': "expected a JSON object",
    '{"a": ["("]}': r"'\(' is not a regular expression",
    '{"a": ["x", "(?i)y"]}': "is not a regular expression: global flags not at the start",
    '{"other tokens": ["x"]}': "'other tokens' are the tokens of no class, expected another name",
    '{"a": ["x{99999999999}"]}': "is not a regular expression: the repetition number is too large",
}


@pytest.mark.parametrize("text", NO_CLASSES)
def test_what_is_no_file_of_classes(tmp_path, text):
    (tmp_path / "classes.json").write_text(text)
    with pytest.raises(DatasetError, match=f"--classes .*classes.json.*{NO_CLASSES[text]}"):
        read_classes(tmp_path / "classes.json")
    with pytest.raises(DatasetError, match="it can not be read"):
        read_classes(tmp_path / "none.json")
