"""Two processes (gloo, on CPUs) with the README's configurations: weights sharded by FSDP2, the optimiser by ZeRO-2."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from paths import ROOT

pytest.importorskip("trl")
pytest.importorskip("peft")

import trl_runs
import trl_sharded
from hf_models import one_thread  # noqa: F401
from launching import launched

SAME = (
    "loss", "grad_norm", "reward", "reward_std", "completions/mean_length", "num_tokens", "entropy", "ratio/max",
    "reweight/mean_weight", "approx_kl", "kl", "delta_logp/mean", "delta_logp/min", "delta_logp/max",
    "dynamic_sampling/refills",
)  # fmt: skip
#: How a run says that it is sharded.
SHARDED = {"FSDP": ("DistributedType.FSDP", "DTensor"), "DEEPSPEED": ("DistributedType.DEEPSPEED", "Parameter")}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process logs in the runs whose responses do not depend on how many there are."""
    directory = tmp_path_factory.mktemp("alone")
    trl_runs.saved_policy(directory / "policy")
    runs = (trl_sharded.seeded, trl_sharded.with_reference, trl_sharded.with_adapters)
    logs = {run.__name__: trl_runs.logs(run(directory, 8)) for run in runs}
    return logs | {"goes_on": logs["seeded"]}


def configuration(kind: str, **changes: object) -> str:
    """The README's configuration of that kind of accelerate's, for two processes in float32."""
    (found,) = re.findall(
        rf"```yaml\n(distributed_type: {kind}\n.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S
    )
    for name, value in {"num_processes": 2, "mixed_precision": "no", **changes}.items():
        found, count = re.subn(rf"(\b{name}: ).*", rf"\g<1>{value!r}", found)
        assert count == 1, name
    return found


def train(tmp_path: Path, config: str) -> subprocess.CompletedProcess:
    (tmp_path / "config.yaml").write_text(config)
    trl_runs.saved_policy(tmp_path / "policy")
    # DeepSpeed looks for a device by itself.
    return launched(
        "trl_sharded.py", [tmp_path / "logs.json", tmp_path], "--config_file", str(tmp_path / "config.yaml"),
        DS_ACCELERATOR="cpu",
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_sharded_training_is_that_of_one_process(tmp_path, alone, one_thread, kind):  # noqa: F811
    if kind == "DEEPSPEED":
        pytest.importorskip("deepspeed")
    done = train(tmp_path, configuration(kind))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "logs.json").read_text())
    assert found.keys() == trl_sharded.RUNS.keys()
    for name, run in found.items():
        assert (run["type"], run["parameters"]) == SHARDED[kind]
        assert len(run["steps"]) == 4
        for step, (one, sharded) in enumerate(zip(alone.get(name, []), run["steps"], strict=name in alone)):
            assert one.keys() == sharded.keys()
            for quantity in filter(one.__contains__, SAME):
                expected = pytest.approx(one[quantity], abs=1e-4, rel=1e-4)
                assert sharded[quantity] == expected, (name, step, quantity)
    assert max(entry["dynamic_sampling/refills"] for entry in alone["seeded"]) > 0
    assert abs(alone["with_reference"][3]["delta_logp/mean"]) > 0.1


@pytest.mark.parametrize(
    ("sharding", "message"),
    [
        ({"zero_stage": 3}, "ZeRO-3 shards the weight of the last layer, expected stage 2 or lower, or FSDP$"),
        ({"fsdp_version": 1}, "delta_logp_responses is 16 under FSDP 1, .* expected 0, or fsdp_version 2$"),
    ],
    ids=str,
)
def test_what_can_not_be_trained_is_refused(tmp_path, monkeypatch, sharding, message):
    from trl.trainer import grpo_trainer

    class Sharded(grpo_trainer.DistributedBackend):
        def __init__(self, accelerator):
            super().__init__(accelerator)
            vars(self).update(sharding)

    monkeypatch.setattr(grpo_trainer, "DistributedBackend", Sharded)
    with pytest.raises(ValueError, match=message):
        trl_runs.trainer(tmp_path)
