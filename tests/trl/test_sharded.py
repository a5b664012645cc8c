"""Two processes (gloo, on CPUs): with the README's configurations FSDP2 shards weights, ZeRO-2 the optimiser, and
transformers splits a model."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

pytest.importorskip("trl")
pytest.importorskip("peft")

import torch
import trl_runs
import trl_sharded
from launching import launched

from dlogp_kernels.trl import ReweightedGRPOConfig

SAME = (
    "loss", "grad_norm", "reward", "reward_std", "completions/mean_length", "entropy", "ratio/max", "approx_kl", "kl",
    "reweight/mean_weight", "delta_logp/mean", "delta_logp/min", "delta_logp/max", "dynamic_sampling/refills",
)  # fmt: skip
#: How a run says that it is sharded.
TYPES = {
    "FSDP": ("DistributedType.FSDP", "DTensor"),
    "DEEPSPEED": ("DistributedType.DEEPSPEED", "Parameter"),
    "MULTI_GPU": ("DistributedType.MULTI_GPU", "DTensor"),
}
#: What is tried last.
REFUSED = {
    "FSDP": [],
    "DEEPSPEED": ["DeepSpeed ZeRO-3 shards the weight of the last layer, expected stage 2 or lower, or FSDP"],
    "MULTI_GPU": [
        "model is given by name with a distributed_config that splits it, expected the model itself, from "
        "from_pretrained(…, distributed_config=…)"
    ],
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process logs in the runs whose responses do not depend on how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    directory = save_policy(tmp_path_factory.mktemp("alone"))
    runs = (trl_sharded.seeded, trl_sharded.with_reference, trl_sharded.with_adapters, trl_sharded.evaluated)
    logs = {run.__name__: trl_runs.logs(run(directory, rows=8)) for run in runs}
    torch.set_num_threads(threads)
    return logs | {"goes_on": logs["seeded"]}


def save_policy(directory: Path) -> Path:
    for name, tied in (("policy", True), ("untied", False)):
        trl_runs.saved_policy(directory / name, num_key_value_heads=2, tie_word_embeddings=tied)
    return directory


def configuration(kind: str) -> str:
    """The README's configuration of that kind of accelerate's, for two processes in float32."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (found,) = re.findall(rf"```yaml\n(distributed_type: {kind}\n.*?)```", readme, re.S)
    for name, value in {"num_processes": 2, "mixed_precision": "no"}.items():
        found, count = re.subn(rf"(\b{name}: ).*", rf"\g<1>{value!r}", found)
        assert count == 1, name
    return found


def check(found: dict[str, Any], alone: dict[str, Any], kind: str) -> None:
    for name, run in found.items():
        assert (run["type"], run["head"]) == TYPES[kind]
        assert len(run["steps"]) == 4
        for step, (one, sharded) in enumerate(zip(alone.get(name, []), run["steps"], strict=name in alone)):
            assert one.keys() == sharded.keys()
            # TRL's count a response once for each process that has it.
            quantities = [name for name in SAME if name in one and (kind != "MULTI_GPU" or name != "reward_std")]
            for quantity in quantities:
                expected = pytest.approx(one[quantity], abs=1e-4, rel=1e-4)
                assert sharded[quantity] == expected, (name, step, quantity)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MULTI_GPU"])
def test_sharded_training_is_that_of_one_process(tmp_path, alone, kind):
    if kind == "DEEPSPEED":
        pytest.importorskip("deepspeed")
    if kind == "MULTI_GPU":
        copies, runs, options = 2, trl_sharded.RUNS_IN_TENSOR_PARALLEL, ["--multi_gpu", "--num_processes", "2"]
    else:
        (tmp_path / "config.yaml").write_text(configuration(kind))
        copies, runs, options = 1, trl_sharded.RUNS, ["--config_file", str(tmp_path / "config.yaml")]
    # DeepSpeed looks for a device by itself.
    done = launched(
        "trl_sharded.py", [tmp_path / "logs.json", save_policy(tmp_path), copies], *options, DS_ACCELERATOR="cpu"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "logs.json").read_text())
    assert found["runs"].keys() == runs.keys()
    check(found["runs"], alone, kind)
    assert found["refused"] == REFUSED[kind]
    assert max(entry["dynamic_sampling/refills"] for entry in alone["seeded"]) > 0
    assert abs(alone["with_reference"][3]["delta_logp/mean"]) > 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "^rollout_seed is None with a model that 2 processes have together, expected a number"),
        (
            {"rollout_seed": 1, "num_generations": 8},
            "^per_device_train_batch_size × steps_per_generation is 4 with .*, expected a multiple of num_generations",
        ),
    ],
)
def test_tensor_parallel_processes_have_the_same_responses(tmp_path, options, message):
    config = ReweightedGRPOConfig(**trl_runs.options(tmp_path, generation_batch_size=4))
    # As it is where four more responses are another process's.
    vars(config).update(options)
    with pytest.raises(ValueError, match=message):
        config.for_tensor_parallel(2)


def test_parameters_of_fsdp_1_are_not_copied(tmp_path, monkeypatch):
    """accelerate makes no FSDP 1 without a GPU."""
    from trl.trainer import grpo_trainer

    class Sharded(grpo_trainer.DistributedBackend):
        def __init__(self, accelerator):
            super().__init__(accelerator)
            self.fsdp_version = 1

    message = "delta_logp_responses is 16 under FSDP 1, .* expected 0, or fsdp_version 2$"
    monkeypatch.setattr(grpo_trainer, "DistributedBackend", Sharded)
    with pytest.raises(ValueError, match=message):
        trl_runs.trainer(tmp_path)
