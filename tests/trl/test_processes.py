"""Two processes (gloo, on the CPU) train as one does."""

import json

import pytest

pytest.importorskip("trl")

import trl_processes
from hf_models import one_thread  # noqa: F401
from launching import launched

SAME = ("loss", "grad_norm", "reward", "reward_std", "completions/mean_length", "num_tokens")
#: Of a whole batch of responses; of one that is parted, means and extremes over its parts are averaged.
SAME_IN_ONE = (
    "entropy", "reweight/mean_weight", "clip_ratio/region_mean", "ratio/max", "approx_kl", "delta_logp/mean",
    "delta_logp/min", "delta_logp/max", "dynamic_sampling/dropped", "dynamic_sampling/refills",
)  # fmt: skip


def test_two_processes_have_the_losses_of_one(tmp_path):
    # Without GPUs that is two processes on the CPU; --cpu would start them by MPI.
    options = ("--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no")
    done = launched(
        "trl_processes.py", [tmp_path / "two.json", 2], *options, "--dynamo_backend", "no", ACCELERATE_USE_CPU="true"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((tmp_path / "two.json").read_text())
    one = trl_processes.train(tmp_path, 1)
    for name in trl_processes.RUNS:
        assert len(one[name]) == len(two[name]) == 4
        for step, (alone, shared) in enumerate(zip(one[name], two[name], strict=True)):
            assert alone.keys() == shared.keys()
            for quantity in SAME if name == "accumulated" else SAME + SAME_IN_ONE:
                if quantity in alone:
                    expected = pytest.approx(alone[quantity], abs=1e-4, rel=1e-4)
                    assert shared[quantity] == expected, (name, step, quantity)
    assert max(entry["dynamic_sampling/refills"] for entry in one["low_prob"]) > 0
    assert one["ppl"][0]["reweight/mean_weight"] != 1.0
