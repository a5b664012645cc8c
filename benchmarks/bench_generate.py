"""`hf.generate` on the demo pair, beside what it can not do without and beside what one would write without it.

The others replay the tokens that `hf.generate` drew, row by row with the same batches, and draw nothing:

- forwards: the two models' forwards, each with its cache; only the time within the models' calls counts;
- generate calls: two `model.generate(max_new_tokens=1)` calls a step, on all tokens so far;
- generate calls, caches kept: the same, each model's cache handed from call to call. No rows leave.

`transformers` is imported where it is called: in the processes that measure the ops' memory it would only take time.
"""

import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dlogp_kernels.demo import task
from dlogp_kernels.demo.generate import PAIR_DIRECTORY

from .shapes import Shape, Workload
from .timing import Candidate, NotMeasuredError

OP = "hf.generate"
#: Of the task, words and the four special ones; 64 problems.
WORK = Workload(OP, Shape("demo pair", 0, len(task.WORDS) + 4), 64, "float32")

_SETTING: Any = {"gamma": 0.1, "criterion": "delta_logp", "threshold": -0.3, "seed": 0}
_MAX_NEW_TOKENS = task.MAX_RESPONSE_WORDS
_LIMITS = {"logp": 1e-3, "base_logp": 1e-3}


@dataclass(frozen=True)
class Replay:
    """The pair, prompts of one length (B, T_prompt), and what was drawn for them."""

    models: tuple[Any, Any]
    prompts: Tensor
    drawn: Any

    def steps(self) -> Iterator[Tensor]:
        """The rows (b,) that are in the batch at each step."""
        for step in range(int(self.drawn.lengths.max())):
            yield (self.drawn.lengths > step).nonzero().squeeze(-1)


def generate(replay: Replay) -> float:
    """Seconds of all that `hf.generate` does."""
    start = time.perf_counter()
    _drawn(replay.models, replay.prompts)
    return time.perf_counter() - start


@torch.no_grad()
def forwards(replay: Replay) -> float:
    """Seconds within the models' forwards; rows that are done leave the caches outside of them."""
    seconds = 0.0
    caches: list[Any] = [None, None]
    names = [_cache_name(model) for model in replay.models]
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
            output = model(input_ids=input_ids, use_cache=True, logits_to_keep=1, **{names[number]: caches[number]})
            caches[number] = getattr(output, names[number])
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
    names = [_cache_name(model) for model in replay.models]
    start = time.perf_counter()
    for step in range(int(replay.drawn.lengths.max())):
        input_ids = torch.cat([replay.prompts, replay.drawn.tokens[:, :step]], 1)
        for number, model in enumerate(replay.models):
            output = _one_token(model, input_ids, **{names[number]: caches[number]})
            caches[number] = getattr(output, names[number])
    return time.perf_counter() - start


def _cache_name(model: Any) -> str:
    from dlogp_kernels.hf.backbone import cache_name

    return cache_name(inspect.signature(model.forward).parameters)


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


#: Seconds of each.
_CANDIDATES: Mapping[str, Callable[[Replay], float]] = {
    "ours": generate,
    "forwards": forwards,
    "generate calls": generate_calls,
    "generate calls, caches kept": generate_calls_with_caches,
}


def build(work: Workload, device: torch.device) -> Replay:
    """The pair in float32, and its responses to held-out problems."""
    if device.type != "cpu":
        raise NotMeasuredError("the demo pair is so small that a GPU would measure nothing but launches")
    try:
        from dlogp_kernels import hf
    except ModuleNotFoundError as error:
        raise NotMeasuredError(f"not installed: {error.name}") from error
    tokenizer = hf.load_tokenizer(PAIR_DIRECTORY / "rl")
    models = [hf.load_model(PAIR_DIRECTORY / name, dtype=torch.float32) for name in ("rl", "base")]
    texts = [problem.prompt for problem in task.generate_problems(work.n, seed=0)]
    prompts = torch.tensor(tokenizer(texts, add_special_tokens=False)["input_ids"])
    return Replay((models[0], models[1]), prompts, _drawn(models, prompts))


def candidates(replay: Replay) -> list[Candidate]:
    """Each returns its seconds."""
    ours, *others = (Candidate(name, partial(function, replay)) for name, function in _CANDIDATES.items())
    return [Candidate("ours", ours.forward, check=partial(errors_of, replay), limits=_LIMITS), *others]


def _drawn(models: Sequence[Any], prompts: Tensor) -> Any:
    from dlogp_kernels import hf

    return hf.generate(models[0], models[1], prompts, max_new_tokens=_MAX_NEW_TOKENS, **_SETTING)


@torch.no_grad()
def errors_of(replay: Replay) -> dict[str, float]:
    """The largest error of each log-probability, beside whole forwards."""
    from dlogp_kernels import hf

    drawn, begin = replay.drawn, replay.prompts.shape[1] - 1
    inside = torch.arange(drawn.tokens.shape[1]) < drawn.lengths[:, None]
    stats = hf.token_metrics(*replay.models, torch.cat([replay.prompts, drawn.tokens], 1))
    return {
        name: (getattr(stats, name)[:, begin:] - getattr(drawn, name))[inside].abs().max().item() for name in _LIMITS
    }
