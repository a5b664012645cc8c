"""Training runs of a second for the tests of dlogp_kernels.trl: a tiny model, short prompts, a cheap reward."""

import zlib
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from dlogp_kernels.hf.tiny import PreTrainedModel, PreTrainedTokenizerFast, save_local, tiny_qwen3, word_tokenizer
from dlogp_kernels.trl import ReweightedGRPOConfig, ReweightedGRPOTrainer

WORDS = [f"w{number}" for number in range(28)]
PROMPTS = [f"<bos> w{n} w{(3 * n) % 28} <sep>" if n % 2 else f"<bos> w{n} <sep>" for n in range(12)]


def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer(WORDS)


def policy(**options: Any) -> PreTrainedModel:
    """A model whose distributions are neither flat nor peaked, so that rewards differ within groups."""
    model = tiny_qwen3(
        32,
        hidden_size=32,
        num_layers=2,
        intermediate_size=48,
        num_heads=2,
        head_dim=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **{"num_key_value_heads": 1, **options},
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                torch.nn.init.normal_(parameter, std=0.2)
    return model


def saved_policy(directory: Path, **options: Any) -> str:
    """As a directory, where TRL finds the reference model."""
    save_local(policy(**options), tokenizer(), directory)
    return str(directory)


def even_words(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The share of even tokens, with a small part that depends on the prompt."""
    return [
        sum(token % 2 == 0 for token in ids) / len(ids) + (zlib.crc32(prompt.encode()) % 7) / 100
        for prompt, ids in zip(prompts, completion_ids, strict=True)
    ]


def options(out: Path | str, **others: Any) -> dict[str, Any]:
    """Eight responses, two prompts, in a batch; each is learned from in two steps of four responses."""
    return {
        "output_dir": str(out),
        "seed": 3,
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "dataloader_pin_memory": False,
        "report_to": [],
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "generation_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        **others,
    }


def trainer(
    out: Path | str,
    model: Any = None,
    reward: Any = even_words,
    *,
    trl: bool = False,
    peft: Any = None,
    held_out: int = 0,
    **others: Any,
) -> Any:
    """A trainer of this library, or TRL's own; `others` are options of the config."""
    config, kind = (GRPOConfig, GRPOTrainer) if trl else (ReweightedGRPOConfig, ReweightedGRPOTrainer)
    return kind(
        policy() if model is None else model,
        reward_funcs=reward,
        args=config(**options(out, **others)),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        eval_dataset=Dataset.from_dict({"prompt": PROMPTS[:held_out]}) if held_out else None,
        processing_class=tokenizer(),
        peft_config=peft,
    )


def logs(trained: Any) -> list[dict[str, Any]]:
    """What was logged at each step."""
    return [entry for entry in trained.state.log_history if "loss" in entry]


def losses(trained: Any) -> list[float]:
    return [entry["loss"] for entry in logs(trained)]


class StopAt(TrainerCallback):
    """Ends the process's training as a kill does: nothing is saved after this step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt
