"""`python -m benchmarks.bench_generate`: `hf.generate` on the demo pair, beside what it can not do without.

Rounds and ratios as in `harness`: everything is measured once a round, and ratios are taken within it. The others
replay the tokens that `hf.generate` drew, row by row with the same batches, and draw nothing:

- forwards: the two models' forwards, each with its cache; only the time within the models' calls counts;
- generate calls: two `model.generate(max_new_tokens=1)` calls a step, on all tokens so far;
- generate calls, caches kept: the same, each model's cache handed from call to call. No rows leave.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dlogp_kernels import backends, hf
from dlogp_kernels.demo import task
from dlogp_kernels.demo.generate import PAIR_DIRECTORY

from .harness import Quantiles, WrongResultError, quantiles

_SETTING: Any = {"gamma": 0.1, "criterion": "delta_logp", "threshold": -0.3, "seed": 0}
_MAX_NEW_TOKENS = task.MAX_RESPONSE_WORDS
_LOGP_ERROR = 1e-3
#: Times the forwards alone, and times the speed of generate calls.
_REACH = {"forwards": 1.25, "generate calls": 5.0}


@dataclass(frozen=True)
class Replay:
    """The pair, prompts of one length (B, T_prompt), and what was drawn for them."""

    models: tuple[Any, Any]
    prompts: Tensor
    drawn: hf.Generation

    @property
    def tokens(self) -> int:
        return int(self.drawn.lengths.sum())

    def steps(self) -> Iterator[Tensor]:
        """The rows (b,) that are in the batch at each step."""
        for step in range(int(self.drawn.lengths.max())):
            yield (self.drawn.lengths > step).nonzero().squeeze(-1)


def generate(replay: Replay) -> float:
    """Seconds of all that `hf.generate` does."""
    start = time.perf_counter()
    hf.generate(*replay.models, replay.prompts, max_new_tokens=_MAX_NEW_TOKENS, **_SETTING)
    return time.perf_counter() - start


@torch.no_grad()
def forwards(replay: Replay) -> float:
    """Seconds within the models' forwards; rows that are done leave the caches outside of them."""
    seconds = 0.0
    caches: list[Any] = [None, None]
    batch, input_ids = torch.arange(len(replay.prompts)), replay.prompts
    for step, rows in enumerate(replay.steps()):
        if step > 0:
            input_ids = replay.drawn.tokens[rows, step - 1, None]
        if len(rows) < len(batch):
            staying = torch.isin(batch, rows).nonzero().squeeze(-1)
            for cache in caches:
                cache.reorder_cache(staying)
        batch = rows
        start = time.perf_counter()
        for number, model in enumerate(replay.models):
            output = model(input_ids=input_ids, past_key_values=caches[number], use_cache=True, logits_to_keep=1)
            caches[number] = output.past_key_values
        seconds += time.perf_counter() - start
    return seconds


def generate_calls(replay: Replay) -> float:
    """Seconds of two calls a step on the whole rows that are not done."""
    start = time.perf_counter()
    for step, rows in enumerate(replay.steps()):
        input_ids = torch.cat([replay.prompts[rows], replay.drawn.tokens[rows, :step]], 1)
        for model in replay.models:
            _one_token(model, input_ids)
    return time.perf_counter() - start


def generate_calls_with_caches(replay: Replay) -> float:
    """The same, all rows to the end, each model on one new token a call."""
    caches: list[Any] = [None, None]
    start = time.perf_counter()
    for step in range(int(replay.drawn.lengths.max())):
        input_ids = torch.cat([replay.prompts, replay.drawn.tokens[:, :step]], 1)
        for number, model in enumerate(replay.models):
            caches[number] = _one_token(model, input_ids, past_key_values=caches[number]).past_key_values
    return time.perf_counter() - start


def _one_token(model: Any, input_ids: Tensor, **options: Any) -> Any:
    """With the logits, from which the token would be drawn."""
    return model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=1,
        do_sample=True,
        top_k=0,
        return_dict_in_generate=True,
        output_logits=True,
        **{name: value for name, value in options.items() if value is not None},
    )


_CANDIDATES: Mapping[str, Callable[[Replay], float]] = {
    "hf.generate": generate,
    "forwards": forwards,
    "generate calls": generate_calls,
    "generate calls, caches kept": generate_calls_with_caches,
}


def prepare(problems: int) -> Replay:
    """The pair in float32, and its responses to held-out problems; verified against `hf.token_metrics`."""
    tokenizer = hf.load_tokenizer(PAIR_DIRECTORY / "rl")
    rl, base = (hf.load_model(PAIR_DIRECTORY / name, dtype=torch.float32) for name in ("rl", "base"))
    texts = [problem.prompt for problem in task.generate_problems(problems, seed=0)]
    prompts = torch.tensor(tokenizer(texts, add_special_tokens=False)["input_ids"])
    replay = Replay((rl, base), prompts, hf.generate(rl, base, prompts, max_new_tokens=_MAX_NEW_TOKENS, **_SETTING))
    _verify(replay)
    return replay


@torch.no_grad()
def _verify(replay: Replay) -> None:
    drawn, begin = replay.drawn, replay.prompts.shape[1] - 1
    inside = torch.arange(drawn.tokens.shape[1]) < drawn.lengths[:, None]
    stats = hf.token_metrics(*replay.models, torch.cat([replay.prompts, drawn.tokens], 1))
    for name in ("logp", "base_logp"):
        error = (getattr(stats, name)[:, begin:] - getattr(drawn, name))[inside].abs().max().item()
        if not error <= _LOGP_ERROR:
            raise WrongResultError(f"hf.generate: {name} is off by {error:.2e}, expected at most {_LOGP_ERROR:.2e}")


def measure(replay: Replay, rounds: int) -> list[dict[str, float]]:
    """Seconds of each candidate in each round, after a warm-up, in an order that rotates."""
    for candidate in _CANDIDATES.values():
        candidate(replay)
    names = list(_CANDIDATES)
    result = []
    for number in range(rounds):
        first = number % len(names)
        result.append({name: _CANDIDATES[name](replay) for name in names[first:] + names[:first]})
    return result


def _row(name: str, replay: Replay, rounds: list[dict[str, float]]) -> str:
    seconds = quantiles([samples[name] for samples in rounds])
    speed = replay.tokens / seconds.median
    text = f"| {name} | {1e3 * seconds.median:.0f} ms | {speed:.0f} |"
    if name == "hf.generate":
        return f"{text} | |"
    ratio = quantiles([samples["hf.generate"] / samples[name] for samples in rounds])
    if name == "forwards":
        return f"{text} {ratio.median:.2f} × its time ({_range(ratio)}) | ≤ {_REACH[name]:.2f} |"
    faster = Quantiles(1 / ratio.median, 1 / ratio.p80, 1 / ratio.p20)
    reach = f"≥ {_REACH[name]:.0f}" if name in _REACH else ""
    return f"{text} {faster.median:.1f} × as fast ({_range(faster)}) | {reach} |"


def _range(values: Quantiles) -> str:
    return f"{values.p20:.2f} … {values.p80:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_generate", description=__doc__)
    parser.add_argument("--problems", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, help="as many as PyTorch takes by default")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    replay = prepare(options.problems)
    rounds = measure(replay, options.rounds)
    print(
        f"{options.problems} problems, {replay.tokens} tokens in {replay.drawn.tokens.shape[1]} steps, float32, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, backend "
        f"`{backends.select('extrapolated_sample', torch.device('cpu'))}`; medians of {len(rounds)} rounds\n"
    )
    print("| what | time | tokens/s | hf.generate takes or is | reach |\n|---|---|---|---|---|")
    for name in _CANDIDATES:
        print(_row(name, replay, rounds))


if __name__ == "__main__":
    main()
