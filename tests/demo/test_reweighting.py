"""`python -m dlogp_kernels.demo.reweighting`, small: runs, resumption, what is summed up. No method has to win."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from dlogp_kernels.demo.reweighting import __main__ as command
from dlogp_kernels.demo.reweighting import lemma, summary, training
from dlogp_kernels.demo.reweighting.training import Budget

MINIATURE = Budget(
    rollouts=2,
    prompts_per_rollout=2,
    samples_per_prompt=4,
    num_problems=6,
    samples_per_problem=2,
    lemma_every=1,
    learning_rate=1e-2,
    warmup_steps=0,
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs")
    # As the command does. On a busy machine two threads wait for each other at every op.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "METHODS", {"none": 0.0, "ppl": 0.2})
        command.run_all(directory, range(1), MINIATURE)
    torch.set_num_threads(threads)
    return directory


def test_what_a_run_leaves(runs: Path):
    dapo, ppl = (json.loads((runs / f"seed-0-{method}.json").read_text()) for method in ("none", "ppl"))
    # The same prompts and noise; the first rollout is before any difference in the weights.
    assert dapo["curves"]["length"][0] == ppl["curves"]["length"][0]
    for run in (dapo, ppl):
        assert run["curves"]["rollout"] == [1, 2]
        assert {"accuracy", "entropy", "length"} < run["curves"].keys()
        assert [check["step"] for check in run["lemma"]] == [2, 4]
        assert all(check["largest_deviation"] < 1e-6 and check["largest_clipped"] == 0 for check in run["lemma"])
        found = run["evaluation"]
        assert len(found["correct"]) == 6 and set(found["correct"]) <= set("012")
        assert found["avg"] == pytest.approx(sum(map(int, found["correct"])) / 12)
        assert found["pass"] == pytest.approx(sum(digit != "0" for digit in found["correct"]) / 6)
    assert sum(check["num_tokens"] for check in dapo["lemma"]) > 0


def test_a_finished_run_is_not_done_again(runs: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(command, "METHODS", {"none": 0.0, "low_prob": 0.2, "ppl": 0.2})
    trained = []

    def train(method: str, seed: int, budget: Budget) -> dict[str, Any]:
        trained.append((method, seed))
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", train)
    before = {path: path.read_bytes() for path in runs.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        command.run_all(runs, range(2), MINIATURE)
    assert trained == [("low_prob", 0)]
    assert {path: path.read_bytes() for path in runs.iterdir()} == before
    with pytest.raises(SystemExit, match="is of rollouts 2, not 3"):
        command.run_all(runs, range(1), Budget(**{**vars(MINIATURE), "rollouts": 3}))


def test_what_is_written_of_runs(runs: Path, tmp_path: Path):
    results = command.collect(runs)
    paths = command.write(results, tmp_path)
    assert [path.name for path in paths] == ["reweighting.json", "reweighting.md", "reweighting.png"]
    assert json.loads(paths[0].read_text()) == results
    assert results["settings"]["rollouts"] == 2 and "method" not in results["settings"]
    assert results["environment"]["versions"]["trl"]
    assert summary.table(results) in paths[1].read_text()
    head = "| method | α | seeds | avg@2 | minus DAPO | pass@2 | minus DAPO | accuracy in training | minus DAPO |"
    assert summary.table(results).splitlines()[0] == head
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def _run(method: str, seed: int, avg: float) -> dict[str, Any]:
    return {
        "method": method,
        "seed": seed,
        "evaluation": {"avg": avg, "pass": 1.0},
        "curves": {"accuracy": [avg, avg]},
        "lemma": [{"largest_deviation": avg, "num_tokens": 10, "largest_clipped": 0.0, "num_clipped": 1}],
    }


def test_differences_are_paired_by_seed():
    dapo, low_prob = (0.1, 0.5, 0.9), (0.2, 0.7, 1.2)
    results = {
        "settings": {"samples_per_problem": 4},
        "base": {"avg": 0.05, "pass": 0.5},
        "runs": [_run("none", seed, avg) for seed, avg in enumerate(dapo)]
        + [_run("low_prob", seed, avg) for seed, avg in reversed(list(enumerate(low_prob)))],
    }
    assert list(summary.differences(results, "low_prob", "avg")) == pytest.approx([0.1, 0.2, 0.3])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in summary.table(results).splitlines()[2:]]
    assert [row[0] for row in rows] == ["base model", "DAPO", "low_prob"]
    # Standard deviations 0.4 and 0.1 over √3.
    assert rows[1][2:5] == ["3", "0.5000 ± 0.2309", "–"]
    assert rows[2][4] == "+0.2000 ± 0.0577"
    assert rows[2][6] == "+0.0000 ± 0.0000"
    assert "60 tokens" in summary.lemma_text(results) and "relative 1e+00" in summary.lemma_text(results)


def test_the_check_of_the_lemma_sees_another_loss(monkeypatch: pytest.MonkeyPatch):
    logits, target = torch.randn(4, 6, 9), torch.randint(9, (4, 6))
    logp = logits.log_softmax(-1).gather(-1, target[..., None]).squeeze(-1)
    mask = torch.arange(6) < torch.tensor([6, 3, 1, 6])[:, None]
    old_logp = (logp + 0.4 * torch.randn(4, 6)).clamp_max(0.0).masked_fill(~mask, torch.nan)
    check = functools.partial(
        lemma.check,
        logits,
        target,
        old_logp,
        torch.tensor([1.0, -1.0, 0.0, 2.0]),
        mask,
        reweight="low_prob",
        alpha=0.2,
        clip_low=0.2,
        clip_high=0.28,
        dual_clip=10.0,
    )
    found = check()
    assert found.largest_deviation < 1e-12 and found.largest_clipped == 0
    # Two responses of six tokens and one of three; the one without an advantage has no gradient.
    assert found.num_clipped > 0 and found.num_tokens + found.num_clipped == 15
    right = lemma.policy_loss
    monkeypatch.setattr(lemma, "policy_loss", lambda *args, **named: right(*args, **{**named, "alpha": 0.1}))
    assert check().largest_deviation > 0.01
