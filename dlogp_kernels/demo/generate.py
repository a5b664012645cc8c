"""Sampled responses of a demo model, graded, and their file format."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import task

PAIR_DIRECTORY = Path(__file__).parent / "pair"
"""The pair that comes with the package: `base/`, `rl/` and `metadata.json`."""


class Response(NamedTuple):
    """One sampled response; `prompt_ids` and `token_ids` are the ids that the model read and wrote."""

    problem: task.Problem
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    correct: bool


@torch.inference_mode()
def generate_responses(
    model: Any,
    tokenizer: Any,
    problems: Sequence[task.Problem],
    *,
    seed: int,
    temperature: float = 1.0,
    batch_size: int = 256,
    max_new_tokens: int = task.MAX_RESPONSE_WORDS,
) -> list[Response]:
    """One response to each problem, from `model.generate`, ending with `<eos>` unless it ran out of room.

    The draws depend on `seed`, on the problems and on `batch_size`; the global random state is left as it
    was. Temperature 0 takes the most likely token.
    """
    responses: list[Response] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, len(problems), batch_size):
            batch = problems[start : start + batch_size]
            encoded = tokenizer([problem.prompt for problem in batch], padding=True, return_tensors="pt")
            sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
            sequences = model.generate(
                **encoded.to(model.device),
                max_new_tokens=max_new_tokens,
                do_sample=temperature > 0,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                **sampling,
            )
            prompt_length = encoded["input_ids"].shape[1]
            for problem, sequence in zip(batch, sequences[:, prompt_length:].tolist(), strict=True):
                responses.append(_grade(tokenizer, problem, sequence))
    return responses


def _grade(tokenizer: Any, problem: task.Problem, token_ids: list[int]) -> Response:
    if tokenizer.eos_token_id in token_ids:
        token_ids = token_ids[: token_ids.index(tokenizer.eos_token_id) + 1]
    text = tokenizer.decode(token_ids, skip_special_tokens=False)
    prompt_ids = tokenizer.encode(problem.prompt)
    return Response(problem, tuple(prompt_ids), tuple(token_ids), text, task.is_correct(problem, text))


def accuracy(responses: Sequence[Response]) -> tuple[float, float]:
    """The share of correct responses and its standard error."""
    mean = sum(response.correct for response in responses) / len(responses)
    return mean, (mean * (1 - mean) / len(responses)) ** 0.5


def response_rows(responses: Sequence[Response], source: str) -> Iterator[dict[str, Any]]:
    """The rows of a file of responses; the tokenizer encodes `prompt` and `response` back to their ids."""
    for index, response in enumerate(responses):
        yield {
            "id": f"{source}-{index:05d}",
            "source": source,
            "prompt": response.problem.prompt,
            "response": response.text,
            "correct": response.correct,
        }


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, in a folder that is made where there is none."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
