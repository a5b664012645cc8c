"""Quantiles in bounded memory are those of numpy, and nothing that needs them reads whole columns."""

import time

import numpy as np
import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("matplotlib")

import pyarrow as pa
from dataset_files import token_rows, write_dataset

from dlogp_kernels.jobs.summary import describe
from dlogp_kernels.report import figures
from dlogp_kernels.report.dataset import ROWS_PER_GROUP, STATISTICS, TokenDataset
from dlogp_kernels.report.quantiles import quantiles

SHARES = (0.0, 0.001, 0.05, 0.25, 0.5, 0.75, 0.995, 1.0)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10, 1000, 30_000])
def test_quantiles_are_those_of_numpy(count):
    rng = np.random.default_rng(count)
    groups, values = rng.choice([0, 1, 3], count), rng.laplace(0, 1, count).astype(np.float32)
    if count >= 10:
        values[count // 2 :] = np.round(values[count // 2 :], 1)
        values[::7], values[1::9], values[2::11], values[3::13], values[4::17] = 0, np.nan, np.inf, -np.inf, -0.0
        values[5], values[6], values[8] = 3e38, -3e38, 1e-45

    def read():
        for begin in range(0, count, 337):
            yield groups[begin : begin + 337], values[begin : begin + 337]

    found = quantiles(read, 4, SHARES)
    assert found.shape == (4, len(SHARES)) and found.dtype == np.float64
    for group in range(4):
        finite = values[(groups == group) & np.isfinite(values)].astype(np.float64)
        expected = np.quantile(finite, SHARES) if len(finite) else np.full(len(SHARES), np.nan)
        np.testing.assert_allclose(found[group], expected, rtol=1e-14, atol=0)


def test_batches_of_one_group_are_told_by_its_number():
    values = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    found = quantiles(lambda: (batch for pair in values for batch in enumerate(pair)), 2, (0.5,))
    assert found.ravel().tolist() == np.median(values, axis=(0, 2)).tolist()


def test_nothing_reads_a_whole_column(tmp_path, monkeypatch):
    count = 2 * ROWS_PER_GROUP + 1
    rows = token_rows("rl", np.zeros(count), ["x"] * count, delta_logp=np.linspace(-3, 3, count))
    dataset = TokenDataset(write_dataset(tmp_path, [rows]))
    for name in ("column", "tokens"):
        monkeypatch.delattr(TokenDataset, name)
    values, sizes = TokenDataset.values, []

    def counted(dataset, *arguments):
        for columns in values(dataset, *arguments):
            sizes.append(len(columns[0]))
            yield columns

    monkeypatch.setattr(TokenDataset, "values", counted)
    for look in (describe, *(getattr(figures, name) for name in figures.__all__ if name.startswith("draw_"))):
        sizes.clear()
        look(dataset)
        assert max(sizes, default=0) <= ROWS_PER_GROUP and (sum(sizes) >= count or look is figures.draw_classes)


def test_what_is_read_ahead_does_not_grow_with_the_data(tmp_path):
    rng, count = np.random.default_rng(0), ROWS_PER_GROUP
    columns = {name: rng.normal(size=count) for name in STATISTICS}
    parts = [[token_rows("rl", np.zeros(count), ["x"] * count, line, **columns)] for line in range(40)]
    dataset = TokenDataset(write_dataset(tmp_path, *parts))
    before, peak = pa.total_allocated_bytes(), 0
    for _ in dataset.values(STATISTICS, "rl"):
        time.sleep(0.005)  # as long as a reader computes
        peak = max(peak, pa.total_allocated_bytes() - before)
    of_part = count * len(STATISTICS) * 4
    assert of_part <= peak <= 6 * of_part


def test_summaries_count_what_is_not_finite(tmp_path):
    parts = [
        [token_rows("rl", [1, 2, 3], "abc", 1, kl=[np.inf, 1.0, np.nan], delta_logp=[np.nan, -np.inf, 2.0])],
        [token_rows("rl", [1, 2], "ab", 2, kl=[np.inf, 3.0], delta_logp=[np.inf, np.nan])],
    ]
    described = describe(TokenDataset(write_dataset(tmp_path, *parts)))["rl"]
    kl, delta_logp = (described["statistics"][name] for name in ("kl", "delta_logp"))
    assert (kl["infinite"], kl["nan"], kl["mean"], kl["std"]) == (2, 1, 2.0, 1.0)
    assert (delta_logp["infinite"], delta_logp["nan"], delta_logp["mean"]) == (2, 2, 2.0)
    assert described["response_tokens"] == 5 and described["delta_logp_tails"]["below -5"] == 0.2
    assert described["delta_logp_tails"]["above 1"] == 0.4
