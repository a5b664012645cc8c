"""The README's examples: run as they stand there, and compared with what they stand for."""

import os
import re
import subprocess
import sys
import types

import pytest
from dataset_files import token_rows, write_dataset
from paths import ROOT

pytest.importorskip("trl")

import torch
from hf_models import one_thread, tiny_model  # noqa: F401

_README = ROOT / "README.md"
#: Of which example each test is, by words in it.
_PAIR, _HIDDEN, _DECODING = "token_metrics(rl, base", "import linear_delta_logp", "generate(rl, base"
_DATA_SET, _FIGURE = "import datasets, duckdb", "draw_positions("
_LOOP, _TRAINER, _VERL = "def train_step", "ReweightedGRPOTrainer(str", "register_policy_loss"
_SPLIT = "DistributedConfig("
_TESTED = (_PAIR, _HIDDEN, _DECODING, _DATA_SET, _FIGURE, _LOOP, _TRAINER, _VERL, _SPLIT)


def examples():
    """The README's blocks of Python."""
    return re.findall(r"```python\n(.*?)```", _README.read_text(encoding="utf-8"), re.S)


def example(words):
    """The one block that contains `words`."""
    (block,) = [block for block in examples() if words in block]
    return block


def test_every_example_has_a_test():
    assert len(examples()) == len(_TESTED) and {example(words) for words in _TESTED} == set(examples())


def test_the_pair(capsys):
    exec(example(_PAIR), {})
    rows = re.findall(r"^(\S+) +Δlog p ([+-][\d.]+)   KL ([\d.]+)$", capsys.readouterr().out, re.M)
    assert min(rows, key=lambda row: float(row[1]))[0] == "jump"  # as the sentence below it says


def test_hidden_states_of_your_own():
    namespace: dict = {}
    exec(example(_HIDDEN), namespace)
    hidden, base_hidden, weight, base_weight, target = (
        namespace[name].detach().double() for name in ("hidden", "base_hidden", "weight", "base_weight", "target")
    )
    hidden.requires_grad_()
    logp, base_logp = ((h @ w.T).log_softmax(-1) for h, w in ((hidden, weight), (base_hidden, base_weight)))
    kl = (logp.exp() * (logp - base_logp)).sum(-1)
    delta_logp = (logp - base_logp).gather(-1, target.long()[..., None])[..., 0]
    (kl - delta_logp).mean().backward()
    torch.testing.assert_close(namespace["hidden"].grad.double(), hidden.grad, rtol=1e-3, atol=1e-5)


def test_decoding(capsys):
    exec(example(_DECODING), {})
    text, replaced = re.fullmatch(r"(.*) (\d+) tokens replaced\n", capsys.readouterr().out).groups()
    assert "<eos>" in text and int(replaced) > 0


def test_any_tool_reads_the_data_set(tmp_path, monkeypatch):
    for name in ("pandas", "polars", "duckdb", "pyarrow"):
        pytest.importorskip(name)
    delta_logp = [0.5, -2.0, 0.25, -1.5]
    right, wrong = (
        token_rows("rl", [1, 2], ["so", "now"], line, delta_logp=values, response={"correct": score})
        for line, values, score in ((1, delta_logp[:2], 1.0), (2, delta_logp[2:], 0.0))
    )
    write_dataset(tmp_path / "out", [right], [wrong])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    namespace: dict = {}
    exec(example(_DATA_SET), namespace)
    assert namespace["raised"].to_dict() == {"so": 0.75, "now": -3.5}
    assert namespace["lowered"]["delta_logp"].to_list() == [-2.0, -1.5]
    assert namespace["rows"]["delta_logp"] == delta_logp
    assert sorted(namespace["by_outcome"]) == [(False, -0.625), (True, -0.75)]


def test_a_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "out", [token_rows("rl", [1, 2], ["a", "b"], delta_logp=[1.0, -1.0])])
    exec(example(_FIGURE), {})
    assert (tmp_path / "positions.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("name", ["qwen3", "granite", "gemma2", "cohere", "gptj_bias"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_plain_loop(name, padded):
    namespace: dict = {}
    exec(example(_LOOP), namespace)
    model, torch_model = tiny_model(name), tiny_model(name)
    torch.manual_seed(0)
    input_ids = torch.randint(0, 160, (4, 12))
    response = torch.arange(12) >= torch.tensor([3, 4, 5, 6])[:, None]
    attention_mask = torch.ones_like(input_ids)
    if padded:
        response[0, 9:] = False
        attention_mask[0, 9:] = 0
    advantage = torch.tensor([1.0, -1.0, 0.5, -0.5])
    kept = response[:, 1:]

    def logp():
        return torch_model(input_ids).logits[:, :-1].log_softmax(-1).gather(-1, input_ids[:, 1:, None])[..., 0]

    old_logp = logp().detach() + 0.3 * torch.randn(kept.shape)
    ratio = (logp() - old_logp).exp()
    weighted = advantage[:, None] * (1 + 0.2 * (1 - old_logp.exp().clamp_max(1)))
    losses = torch.maximum(-weighted * ratio, -weighted * ratio.clamp(0.8, 1.28))
    expected = losses[kept].mean()
    expected.backward()
    optimizers = [torch.optim.SGD(x.parameters(), lr=0.1) for x in (model, torch_model)]
    arguments = model, optimizers[0], input_ids, response, old_logp, advantage
    loss, metrics = namespace["train_step"](*arguments, *([attention_mask] if padded else []))
    optimizers[1].step()
    assert loss == pytest.approx(float(expected), abs=1e-5)
    assert 1.0 < float(metrics.mean_weight) < 1.2
    for (name, weight), other in zip(model.named_parameters(), torch_model.parameters(), strict=True):
        assert torch.allclose(weight, other, atol=1e-4), name


def test_the_trainer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code = example(_TRAINER).replace(".train()", "")
    namespace: dict = {}
    exec(code.replace("ReweightedGRPOTrainer(str", "trainer = ReweightedGRPOTrainer(str"), namespace)
    trainer = namespace["trainer"]
    trainer.args.logging_steps = 1
    trainer.train()
    first, second = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert 1.0 < first["reweight/mean_weight"] < 1.2 and first["dynamic_sampling/refills"] >= 0
    assert 0.0 < first["reward"] < 1.0 and first["delta_logp/mean"] == pytest.approx(0.0, abs=1e-6)
    assert second["delta_logp/max"] > 0.0


def test_tensor_parallel_steps(tmp_path, capsys):
    """Two processes print what one does without the split, each of them."""
    script = tmp_path / "step.py"
    script.write_text(example(_SPLIT))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    capsys.readouterr()
    *steps, end = example(_SPLIT).replace(", distributed_config=split", "").splitlines()
    assert end == "torch.distributed.destroy_process_group()"
    exec("\n".join(steps), {})
    alone = [float(line) for line in capsys.readouterr().out.split()]
    losses = sorted(float(line) for line in run.stdout.split())
    assert len(set(alone)) == 3 and losses == pytest.approx(sorted([*alone, *alone]), abs=1e-5)


class Core:
    """What the example takes of verl/trainer/ppo/core_algos.py, and the loss that it stands for, written from its
    definition: clipped, with a dual clip, times the weights of the rollouts, put together in one of four ways."""

    def __init__(self):
        self.losses = {}

    def register_policy_loss(self, name):
        return lambda function: self.losses.setdefault(name, function)

    @staticmethod
    def together(
        losses, mask, mode, *, dp_size=1, batch_num_tokens=None, global_batch_size=None, loss_scale_factor=None
    ):
        """One number of the losses (B, T) of this micro-batch, out of `dp_size` processes."""
        of_sequences, lengths = (losses * mask).sum(-1), mask.sum(-1)
        responses = (lengths > 0).sum() if global_batch_size is None else global_batch_size
        if mode == "token-mean":
            return of_sequences.sum() * dp_size / (lengths.sum() if batch_num_tokens is None else batch_num_tokens)
        if mode == "seq-mean-token-sum":
            return of_sequences.sum() * dp_size / responses
        if mode == "seq-mean-token-mean":
            return (of_sequences / lengths.clamp_min(1)).sum() * dp_size / responses
        return of_sequences.sum() / (mask.shape[-1] if loss_scale_factor is None else loss_scale_factor)

    @staticmethod
    def clipped(ratio, advantages, low, high, dual):
        losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high))
        return torch.where(advantages < 0, torch.minimum(losses, -advantages * dual), losses)


@pytest.fixture
def core(monkeypatch):
    core = Core()
    module = types.ModuleType("verl.trainer.ppo.core_algos")
    module.register_policy_loss = core.register_policy_loss
    for name in ("verl", "verl.trainer", "verl.trainer.ppo"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "verl.trainer.ppo.core_algos", module)
    exec(example(_VERL), {})
    return core


#: What verl fills in of the whole batch: nothing, by its older actor; else all of it, some of which may be None.
WHOLE = {
    "nothing": {},
    "all": {"dp_size": 2, "batch_num_tokens": 97, "global_batch_size": 12, "loss_scale_factor": 50},
    "without_factor": {"dp_size": 1, "batch_num_tokens": 97, "global_batch_size": None, "loss_scale_factor": None},
}


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
@pytest.mark.parametrize("whole", WHOLE.values(), ids=WHOLE)
@pytest.mark.parametrize("bounds", [(0.2, 0.28), (None, None)], ids=str)
def test_the_loss_of_verl(core, mode, whole, bounds):
    config = types.SimpleNamespace(
        clip_ratio=0.25, clip_ratio_low=bounds[0], clip_ratio_high=bounds[1], clip_ratio_c=3.0, global_batch_info=whole
    )
    torch.manual_seed(0)
    old_log_prob = -3 * torch.rand(6, 9, dtype=torch.float64)
    log_prob = (old_log_prob + 2 * torch.randn(6, 9, dtype=torch.float64)).requires_grad_()
    advantages = torch.tensor([[-1.0], [1.0], [0.3], [-0.5], [0.7], [-0.1]], dtype=torch.float64).expand(6, 9)
    response_mask = (torch.rand(6, 9) > 0.3).long()
    response_mask[2] = 0  # a response that was thrown away
    weights = torch.rand(6, 9, dtype=torch.float64)

    low, high = (0.25 if bound is None else bound for bound in bounds)
    reweighted = advantages * (1 + 0.2 * (1 - old_log_prob.exp()))
    losses = core.clipped((log_prob - old_log_prob).exp(), reweighted, low, high, 3.0) * weights
    expected = core.together(losses, response_mask, mode, **whole)
    (gradient,) = torch.autograd.grad(expected, log_prob)

    loss, metrics = core.losses["low_prob"](
        old_log_prob, log_prob, advantages, response_mask, loss_agg_mode=mode, config=config, rollout_is_weights=weights
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, log_prob)[0], gradient)
    assert metrics["actor/clip_dual"] > 0 and all(isinstance(value, float) for value in metrics.values())


def test_micro_batches_of_verl_add_up(core):
    """Of two processes, whose gradients are averaged, each with two micro-batches, whose gradients are added up."""
    torch.manual_seed(1)
    old_log_prob, log_prob = (-3 * torch.rand(8, 9, dtype=torch.float64) for _ in range(2))
    advantages, mask = torch.randn(8, 1, dtype=torch.float64).expand(8, 9), (torch.rand(8, 9) > 0.4).long()
    whole = {"batch_num_tokens": int(mask.sum()), "global_batch_size": 8, "loss_scale_factor": 9}

    def loss(rows, mode, **info):
        config = types.SimpleNamespace(
            clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=3.0, global_batch_info=whole | info
        )
        given = (x[rows] for x in (old_log_prob, log_prob, advantages, mask))
        return core.losses["low_prob"](*given, loss_agg_mode=mode, config=config)[0]

    for mode in ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean"):
        parts = [loss(slice(begin, begin + 2), mode, dp_size=2) for begin in range(0, 8, 2)]
        torch.testing.assert_close(sum(parts) / 2, loss(slice(None), mode, dp_size=1))
