"""Trains under `accelerate launch` and writes the log of each run: `trl_processes.py OUT.json PROCESSES`.

One process takes eight responses at once, two take four each: a batch of responses is one optimiser step, so that it
does not show how it is parted.
"""

import json
import os
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import trl_runs
from launching import end_group

RUNS = {
    "low_prob": {"reweight": "low_prob", "reweight_alpha": 0.5, "dynamic_sampling": True, "epsilon_high": 0.28},
    "ppl": {"reweight": "ppl", "reweight_alpha": 0.5, "num_generations": 8},
    "accumulated": {"gradient_accumulation_steps": 2, "generation_batch_size": 8, "per_device_train_batch_size": 2},
}


def some_alike(prompts, completion_ids, **_):
    """Of every third prompt all responses are worth the same."""
    rewards = trl_runs.even_words(prompts, completion_ids)
    alike = [int(prompt.split()[1][1:]) % 3 == 0 for prompt in prompts]
    return [0.5 if same else reward for same, reward in zip(alike, rewards, strict=True)]


def train(directory: Path, processes: int) -> dict[str, list[dict[str, float]]]:
    """The log of each run in `RUNS`."""
    result = {}
    for name, options in RUNS.items():
        batch = {"per_device_train_batch_size": 4, "max_steps": 4, "rollout_seed": 5} | options
        if processes == 1:
            batch["per_device_train_batch_size"] *= 2
        trainer = trl_runs.trainer(directory / name, reward=some_alike, **batch)
        assert trainer.accelerator.num_processes == processes
        trainer.train()
        result[name] = trl_runs.logs(trainer)
    return result


def main(out: Path, processes: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as directory:
        logs = train(Path(directory), processes)
    if os.environ.get("RANK", "0") == "0":
        out.write_text(json.dumps(logs))
    if processes > 1:
        end_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
