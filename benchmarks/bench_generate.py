"""`hf.generate` on the demo pair, beside what it can not do without and beside what one would write without it.

The others replay the tokens that `hf.generate` drew, row by row with the same batches, and draw nothing:

- forwards: the two models' forwards, each with its cache, from which rows leave that are done;
- generate calls: two `model.generate(max_new_tokens=1)` calls a step, on all tokens so far.

`transformers` is imported where it is called: in the processes that measure the ops' memory it would only take time.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
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

    def steps(self) -> Iterator[tuple[int, Tensor]]:
        """Each step, and the rows (b,) that are in its batch."""
        for step in range(int(self.drawn.lengths.max())):
            yield step, (self.drawn.lengths > step).nonzero().squeeze(-1)


def build(work: Workload, device: torch.device) -> Replay:
    """The pair in float32, and its responses to held-out problems."""
    if device.type != "cpu":
        raise NotMeasuredError("the demo pair is so small that a GPU would measure nothing but launches")
    try:
        from dlogp_kernels import hf
    except ModuleNotFoundError as error:
        raise NotMeasuredError(f"not installed: {error.name}") from error
    tokenizer = hf.load_tokenizer(PAIR_DIRECTORY / "rl")
    model, base = (hf.load_model(PAIR_DIRECTORY / name, dtype=torch.float32) for name in ("rl", "base"))
    texts = [problem.prompt for problem in task.generate_problems(work.n, seed=0)]
    prompts = torch.tensor(tokenizer(texts, add_special_tokens=False)["input_ids"])
    return Replay((model, base), prompts, _drawn((model, base), prompts))


def candidates(replay: Replay) -> list[Candidate]:
    ours = partial(_drawn, replay.models, replay.prompts)
    others = (Candidate(name, partial(function, replay)) for name, function in OTHERS.items())
    return [Candidate("ours", ours, check=partial(errors_of, replay), limits=_LIMITS), *others]


def _drawn(models: tuple[Any, Any], prompts: Tensor) -> Any:
    from dlogp_kernels import hf

    return hf.generate(*models, prompts, max_new_tokens=_MAX_NEW_TOKENS, **_SETTING)


@torch.no_grad()
def forwards(replay: Replay) -> None:
    from dlogp_kernels.hf.backbone import cache_name

    caches: list[Any] = [None, None]
    names = [cache_name(inspect.signature(model.forward).parameters) for model in replay.models]
    batch, input_ids = torch.arange(len(replay.prompts)), replay.prompts
    for step, rows in replay.steps():
        if step > 0:
            input_ids = replay.drawn.tokens[rows, step - 1, None]
        if len(rows) < len(batch):
            for cache in caches:
                cache.reorder_cache(torch.isin(batch, rows).nonzero().squeeze(-1))
        batch = rows
        for i, (model, name) in enumerate(zip(replay.models, names, strict=True)):
            output = model(input_ids=input_ids, use_cache=True, logits_to_keep=1, **{name: caches[i]})
            caches[i] = getattr(output, name)


def generate_calls(replay: Replay) -> None:
    """With the logits, from which the token would be drawn."""
    options = {"max_new_tokens": 1, "do_sample": True, "top_k": 0}
    for step, rows in replay.steps():
        input_ids = torch.cat([replay.prompts[rows], replay.drawn.tokens[rows, :step]], 1)
        mask = torch.ones_like(input_ids)
        for model in replay.models:
            model.generate(input_ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **options)


OTHERS: Mapping[str, Callable[[Replay], None]] = {"forwards": forwards, "generate calls": generate_calls}


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
