"""`python -m benchmarks.bench_train`: a whole training step of the demo task, beside that of TRL's own trainer.

Both train the demo pair's base model as the pair's script does (16 prompts × 16 responses, spent in two optimiser
steps) on the same seed with `reweight="none"`: the same responses and losses, which is checked. A round trains both
from the start, in turns first and second; a step is timed whole: drawing, rewards, forward, backward, update, metrics.
"""

import argparse
import tempfile
import time
import warnings
from typing import Any

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from dlogp_kernels.demo import task
from dlogp_kernels.demo.generate import PAIR_DIRECTORY
from dlogp_kernels.demo.train_pair import answer_rewards
from dlogp_kernels.hf.tiny import load_local
from dlogp_kernels.trl import ReweightedGRPOConfig, ReweightedGRPOTrainer

from .harness import WrongResultError, quantiles

_LOSS_ERROR = 1e-4
_REACH = 1.0
_OWN, _TRL = "ReweightedGRPOTrainer", "GRPOTrainer"


def train(name: str, batches: int) -> tuple[float, list[float]]:
    """Seconds of a step, the first two steps left out, and the losses."""
    model, tokenizer = load_local(PAIR_DIRECTORY / "base")
    seconds: list[float] = []

    def reward(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        return answer_rewards(prompts, tokenizer.batch_decode(completion_ids, skip_special_tokens=False))

    kind: Any = ReweightedGRPOTrainer if name == _OWN else GRPOTrainer
    with tempfile.TemporaryDirectory() as directory:
        options: dict[str, Any] = {
            "output_dir": directory, "max_steps": 2 * batches, "seed": 0, "per_device_train_batch_size": 128,
            "generation_batch_size": 256, "num_generations": 16, "max_completion_length": task.MAX_RESPONSE_WORDS,
            "top_k": 0, "learning_rate": 2e-4, "epsilon_high": 0.28, "gradient_checkpointing": False, "bf16": False,
            "use_cpu": True, "dataloader_pin_memory": False, "report_to": [], "save_strategy": "no",
            "logging_steps": 1, "disable_tqdm": True,
        }  # fmt: skip
        args = ReweightedGRPOConfig(**options, reweight="none") if name == _OWN else GRPOConfig(**options)
        prompts = [problem.prompt for problem in task.generate_problems(16 * batches, 0, "reinforcement")]
        trainer = kind(
            model, reward, args, train_dataset=Dataset.from_dict({"prompt": prompts}), processing_class=tokenizer
        )
        # Its log goes to the standard output.
        trainer.pop_callback(next(c for c in trainer.callback_handler.callbacks if "Printer" in type(c).__name__))
        step = trainer.training_step

        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = step(*arguments)
            seconds.append(time.perf_counter() - start)
            return result

        trainer.training_step = timed
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return sum(seconds[2:]) / len(seconds[2:]), losses


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_train", description=__doc__)
    parser.add_argument("--batches", type=int, default=4, help="batches of responses a run, two steps each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="as many as PyTorch takes by default")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    rounds: list[dict[str, float]] = []
    for number in range(options.rounds):
        runs = {name: train(name, options.batches) for name in ((_OWN, _TRL) if number % 2 else (_TRL, _OWN))}
        error = max(abs(one - other) for one, other in zip(runs[_OWN][1], runs[_TRL][1], strict=True))
        if not error <= _LOSS_ERROR:
            raise WrongResultError(f"losses differ by {error:.2e}, expected at most {_LOSS_ERROR:.0e}")
        rounds.append({name: seconds for name, (seconds, _) in runs.items()})
    ratio = quantiles([samples[_OWN] / samples[_TRL] for samples in rounds])
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; medians of {len(rounds)} rounds\n")
    print("| a step of | time | times TRL's | reach |\n|---|---|---|---|")
    for name in (_TRL, _OWN):
        seconds = quantiles([samples[name] for samples in rounds])
        text = f"{ratio.median:.3f} ({ratio.p20:.3f} … {ratio.p80:.3f}) | ≤ {_REACH:.2f}" if name == _OWN else "|"
        print(f"| {name} | {1e3 * seconds.median:.0f} ms | {text} |")


if __name__ == "__main__":
    main()
