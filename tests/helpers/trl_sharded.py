"""Trains under `accelerate launch`, with something sharded: `trl_sharded.py OUT.json DIRECTORY COPIES`.

The directory is that of all processes, with models in `policy` and `untied`. So many of the two processes have the
model together by tensor parallelism; then each takes the eight responses at once that one process takes, else four.
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
from launching import end_group
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl_processes import some_alike

from dlogp_kernels.trl.fsdp import reshard

SEEDED = {"reweight": "low_prob", "reweight_alpha": 0.5, "dynamic_sampling": True, "rollout_seed": 5}


def seeded(directory: Path, **options: Any) -> Any:
    return trained(directory, "seeded", **SEEDED, **options)


def with_reference(directory: Path, **options: Any) -> Any:
    settings = {"beta": 0.1, "reweight": "ppl", "num_generations": 8, "rollout_seed": 5}
    return trained(directory, "with_reference", **settings, **options)


def with_adapters(directory: Path, **options: Any) -> Any:
    peft = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return trained(directory, "with_adapters", peft=peft, **SEEDED, **options)


def evaluated(directory: Path, **options: Any) -> Any:
    """With an untied last layer, and forwards without gradients before the first step and between others."""
    settings = {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 2, "held_out": 2}
    more = {"policy": "untied", "per_device_eval_batch_size": 4, "num_generations_eval": 4}
    return trained(directory, "evaluated", **SEEDED, **settings, **more, **options)


def drawn_by_trl(directory: Path, **options: Any) -> Any:
    """With draws that depend on the process."""
    return trained(directory, "drawn_by_trl", **options)


def goes_on(directory: Path, **options: Any) -> Any:
    """The steps of `seeded`, the last two by a trainer that goes on where another one was stopped."""
    settings = SEEDED | {"save_strategy": "steps", "save_steps": 2} | options
    first = trainer(directory, "goes_on", **settings)
    first.add_callback(trl_runs.StopAt(3))
    with contextlib.suppress(KeyboardInterrupt):
        first.train()
    second = trainer(directory, "goes_on", **settings)
    second.train(resume_from_checkpoint=True)
    return second


_ALL = (seeded, with_reference, with_adapters, evaluated, drawn_by_trl, goes_on)
RUNS: dict[str, Callable[..., Any]] = {function.__name__: function for function in _ALL}
#: There TRL does not draw, PEFT does not split its adapters, and transformers does not go on from a checkpoint.
RUNS_IN_TENSOR_PARALLEL = {name: RUNS[name] for name in ("seeded", "with_reference")}


def zero_3(directory: Path, **options: Any) -> Any:
    os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = "3"
    return trainer(directory, "zero_3", **options)


def split_by_name(directory: Path, *, copies: int, **options: Any) -> Any:
    from transformers.distributed import DistributedConfig

    split = {"distributed_config": DistributedConfig(tp_size=copies, tp_plan="auto"), "dtype": "float32"}
    settings = {"generation_batch_size": 8 * copies, "rollout_seed": 5, "model_init_kwargs": split}
    return trainer(directory, "split_by_name", **settings, **options)


def refused(run: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """What the ValueError says that it ends with."""
    try:
        run(*arguments, **options)
    except ValueError as error:
        return str(error)
    raise AssertionError(f"{run.__name__} is not refused")


def trained(*arguments: Any, **options: Any) -> Any:
    made = trainer(*arguments, **options)
    made.train()
    return made


def trainer(directory: Path, name: str, *, rows: int, copies: int = 1, policy: str = "policy", **options: Any) -> Any:
    torch.manual_seed(0)
    model: Any = str(directory / policy)
    if copies > 1:
        from transformers.distributed import DistributedConfig

        split = DistributedConfig(tp_size=copies, tp_plan="auto")
        model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, distributed_config=split)
    settings = {"per_device_train_batch_size": rows, "delta_logp_responses": rows, "generation_batch_size": 8 * copies}
    return trl_runs.trainer(directory / name, model, reward=some_alike, **settings | options)


def on_cpus() -> None:
    """Have accelerate shard on CPUs, where it does so on GPUs alone."""
    from accelerate.state import DistributedType, PartialState

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed

        # What it would compile for CPUs spins while it waits, which takes long where others compute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def main(out: Path, directory: Path, copies: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    on_cpus()
    logs = {}
    for name, run in (RUNS if copies == 1 else RUNS_IN_TENSOR_PARALLEL).items():
        done = run(directory, rows=4 * copies, copies=copies, use_cpu=False)
        # A forward without gradients leaves it gathered.
        reshard(done.model)
        head = type(done.accelerator.unwrap_model(done.model).get_output_embeddings().weight).__name__
        logs[name] = {"steps": trl_runs.logs(done), "type": str(done.accelerator.distributed_type), "head": head}
    messages = []
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        messages.append(refused(zero_3, directory, rows=4, use_cpu=False))
    if copies > 1:
        messages.append(refused(split_by_name, directory, copies=copies, rows=4 * copies, use_cpu=False))
    if os.environ["RANK"] == "0":
        out.write_text(json.dumps({"runs": logs, "refused": messages}))
    end_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
