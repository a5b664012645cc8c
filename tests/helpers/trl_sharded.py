"""Trains under `accelerate launch`, with weights or optimiser sharded: `trl_sharded.py OUT.json DIRECTORY`.

One process takes eight responses at once, two take four each. The directory is that of all processes, with a model in
`policy`.
"""

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import trl_runs
from peft import LoraConfig
from trl_processes import some_alike

SEEDED = {"reweight": "low_prob", "reweight_alpha": 0.5, "dynamic_sampling": True, "rollout_seed": 5}


def seeded(directory: Path, rows: int, **options: Any) -> Any:
    return trained(directory / "seeded", rows, **SEEDED, delta_logp_responses=rows, **options)


def with_reference(directory: Path, rows: int, **options: Any) -> Any:
    model = str(directory / "policy")
    settings = {"beta": 0.1, "reweight": "ppl", "num_generations": 8, "rollout_seed": 5}
    return trained(directory / "reference", rows, model, **settings, **options)


def with_adapters(directory: Path, rows: int, **options: Any) -> Any:
    peft = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return trained(directory / "adapters", rows, peft=peft, **SEEDED, delta_logp_responses=rows, **options)


def drawn_by_trl(directory: Path, rows: int, **options: Any) -> Any:
    """With draws that depend on the process."""
    return trained(directory / "drawn_by_trl", rows, delta_logp_responses=0, **options)


def goes_on(directory: Path, rows: int, **options: Any) -> Any:
    """The steps of `seeded`, the last two by a trainer that goes on where another one was stopped."""
    settings = SEEDED | {"delta_logp_responses": rows, "save_strategy": "steps", "save_steps": 2} | options
    first = trainer(directory / "goes_on", rows, **settings)
    first.add_callback(trl_runs.StopAt(3))
    with contextlib.suppress(KeyboardInterrupt):
        first.train()
    second = trainer(directory / "goes_on", rows, **settings)
    second.train(resume_from_checkpoint=True)
    return second


RUNS: dict[str, Callable[..., Any]] = {
    function.__name__: function for function in (seeded, with_reference, with_adapters, drawn_by_trl, goes_on)
}


def trained(*arguments: Any, **options: Any) -> Any:
    made = trainer(*arguments, **options)
    made.train()
    return made


def trainer(out: Path, rows: int, model: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    return trl_runs.trainer(out, model, reward=some_alike, per_device_train_batch_size=rows, **options)


def on_cpus() -> None:
    """Have accelerate shard on CPUs, where it does so on GPUs alone."""
    from accelerate.state import DistributedType, PartialState

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)


def main(out: Path, shared: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    on_cpus()
    logs = {}
    for name, run in RUNS.items():
        done = run(shared, 4, use_cpu=False)
        kind = type(next(done.model.parameters())).__name__
        logs[name] = {"steps": trl_runs.logs(done), "type": str(done.accelerator.distributed_type), "parameters": kind}
    if os.environ["RANK"] == "0":
        out.write_text(json.dumps(logs))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
