"""What does not fit in a call of the policy loss, by name."""

import linear_policy_cases
import pytest
import torch
from policy_cases import make_inputs, pack, without_extras

from dlogp_kernels import LinearPolicyLoss, PolicyLossModule, backends, linear_policy_loss, policy_loss
from dlogp_kernels.reference.policy import PolicyOptions

X = torch.zeros(5, 36)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logp": torch.zeros(37)}, r"logp has shape \(37,\), expected \(B, T\), or \(N,\) with offsets"),
        ({"logp": torch.zeros(5, 37, dtype=torch.int64)}, r"logp has dtype torch.int64, expected bfloat16"),
        ({"logp": [1.0]}, r"logp is list, expected a tensor"),
        ({"old_logp": X}, r"old_logp has shape \(5, 36\), expected that of logp, \(5, 37\)"),
        ({"old_logp": torch.zeros(5, 37, device="meta")}, r"old_logp is on meta, expected cpu"),
        ({"old_logp": torch.zeros(5, 37, requires_grad=True)}, r"old_logp requires a gradient.*old_logp\.detach\(\)"),
        ({"advantage": torch.zeros(4)}, r"advantage has shape \(4,\), expected \(5,\) or that of logp, \(5, 37\)"),
        ({"advantage": torch.zeros(5, dtype=torch.int64)}, r"advantage has dtype torch.int64"),
        ({"advantage": torch.zeros(5, requires_grad=True)}, r"advantage requires a gradient"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, r"mask has shape \(5,\), expected that of logp"),
        ({"mask": torch.ones(5, 37, dtype=torch.complex64)}, r"mask has dtype torch.complex64, expected bool or 0/1"),
        ({"ref_logp": X}, r"ref_logp has shape \(5, 36\)"),
        ({"kl": torch.zeros(5, 37)}, r"kl is given, expected None beside ref_logp"),
        ({"kl": X, "ref_logp": None}, r"kl has shape \(5, 36\)"),
        ({"entropy": X}, r"entropy has shape \(5, 36\)"),
        ({"token_weight": X}, r"token_weight has shape \(5, 36\)"),
        ({"group": torch.zeros(4, dtype=torch.int64)}, r"group has shape \(4,\), expected \(5,\)"),
        ({"group": torch.zeros(5)}, r"group has dtype torch.float32, expected an integer dtype"),
        ({"group": None, "reweight": "ppl"}, r"group is None, expected the prompts' ids"),
        ({"loss_type": "ppo"}, r"loss_type is 'ppo', expected one of dapo, grpo, bnpo, dr_grpo, cispo, sapo"),
        ({"reweight": "high"}, r"reweight is 'high', expected one of low_prob"),
        ({"reweight_sign": "+"}, r"reweight_sign is '\+', expected one of both, positive, negative"),
        ({"importance": "word"}, r"importance is 'word', expected one of token, sequence, sequence_token"),
        ({"alpha": -0.1}, r"alpha is -0.1, expected a number in \[0, ∞\)"),
        ({"alpha": float("nan")}, r"alpha is nan"),
        ({"reweight": "dominate", "alpha": 1.1}, r"alpha is 1.1, expected a number in \[0, 1\]"),
        ({"clip_low": -0.2}, r"clip_low is -0.2, expected a number in \[0, ∞\)"),
        ({"clip_high": -0.28}, r"clip_high is -0.28, expected a number in \[0, ∞\)"),
        ({"clip_low": "0.2"}, r"clip_low is '0.2', expected a Python number"),
        ({"dual_clip": 1.0}, r"dual_clip is 1.0, expected a number in \(1, ∞\)"),
        ({"kl_beta": -1.0}, r"kl_beta is -1.0"),
        ({"kl_beta": 0.1, "ref_logp": None}, r"ref_logp is None, expected a tensor: kl_beta is 0.1"),
        ({"entropy_coef": 0.1, "entropy": None}, r"entropy is None, expected a tensor: entropy_coef is 0.1"),
        ({"entropy_coef": float("inf")}, r"entropy_coef is inf"),
        ({"num_tokens": -1}, r"num_tokens is -1, expected a number in \[0, ∞\)"),
        ({"num_tokens": torch.tensor(-3)}, r"num_tokens is -3, expected a number in \[0, ∞\)"),
        ({"num_tokens": torch.tensor([float("nan")])}, r"num_tokens is nan, expected a number in \[0, ∞\)"),
        ({"num_tokens": torch.tensor(float("inf"))}, r"num_tokens is inf, expected a number in \[0, ∞\)"),
        ({"num_tokens": 1e-40}, r"num_tokens is 1e-40, expected a number in \[1e-30, 1e\+30\]"),
        (
            {"num_sequences": torch.tensor(-3), "loss_type": "grpo"},
            r"num_sequences is -3, expected a number in \[0, ∞\)",
        ),
        ({"num_sequences": 1e-40, "loss_type": "grpo"}, r"num_sequences is 1e-40, expected a number in \[1e-30"),
        ({"mask": torch.full((5, 37), 0.5)}, r"mask\[0, 0\] is 0.5, expected 0 or 1"),
        ({"mask": torch.eye(5, 37) * float("nan")}, r"mask\[0, 0\] is nan, expected 0 or 1"),
        ({"mask": -100 * torch.eye(5, 37, dtype=torch.int64)}, r"mask\[0, 0\] is -100, expected 0 or 1"),
        ({"alpha": 1e35}, r"alpha is 1e\+35, expected a size of at most 1e\+30"),
        ({"kl_beta": 1e35}, r"kl_beta is 1e\+35, expected a size of at most 1e\+30"),
        ({"entropy_coef": -1e35}, r"entropy_coef is -1e\+35, expected a size of at most 1e\+30"),
        ({"clip_high": 10**400}, r"clip_high is an integer of 1329 bits, expected a number that a float holds"),
        ({"sapo_temperature_pos": 1e-40}, r"sapo_temperature_pos is 1e-40, expected a number in \[1e-30"),
        ({"num_tokens": torch.ones(2)}, r"num_tokens has dtype torch.float32 and shape \(2,\), expected one number"),
        ({"num_tokens": 5, "loss_type": "grpo"}, r"num_tokens is given, expected None: loss_type 'grpo'"),
        ({"num_sequences": 5}, r"num_sequences is given, expected None: loss_type 'dapo' does not divide by it"),
        ({"num_sequences": -2, "loss_type": "grpo"}, r"num_sequences is -2, expected a number in \[0, ∞\)"),
        ({"num_sequences": torch.ones(2), "loss_type": "sapo"}, r"num_sequences has dtype torch.float32 and shape"),
        ({"max_length": 0}, r"max_length is 0, expected an integer in \[1"),
        ({"sapo_temperature_neg": 0.0}, r"sapo_temperature_neg is 0.0, expected a finite number > 0"),
    ],
)
def test_what_does_not_fit(change, message):
    inputs = make_inputs()
    inputs["logp"].requires_grad_()
    with pytest.raises((ValueError, TypeError), match=message):
        policy_loss(**(inputs | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": torch.tensor([0, 100])}, r"offsets go from 0 to 100, expected numbers from 0 to 63"),
        ({"offsets": torch.tensor([1, 63])}, r"offsets go from 1 to 63"),
        ({"offsets": torch.tensor([0, 40, 20, 63])}, r"that do not decrease"),
        ({"offsets": torch.tensor([0.0, 63.0])}, r"offsets has dtype torch.float32, expected an integer dtype"),
        ({"offsets": torch.zeros(0, dtype=torch.int64)}, r"offsets has shape \(0,\), expected \(B \+ 1,\)"),
        ({"logp": torch.zeros(5, 37)}, r"logp has shape \(5, 37\), expected \(N,\) with offsets"),
        ({"loss_type": "dr_grpo"}, r"max_length is None, expected a number: loss_type 'dr_grpo'"),
        ({"advantage": torch.zeros(6)}, r"advantage has shape \(6,\), expected \(5,\) or that of logp, \(63,\)"),
    ],
)
def test_what_does_not_fit_packed_tokens(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        policy_loss(**(pack(make_inputs(), [37, 20, 5, 0, 1]) | change))


H, W = torch.zeros(3, 11, 24), torch.zeros(301, 24)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hidden": torch.zeros(3, 11, 23)},
            r"weight has shape \(301, 24\), expected \(V, 23\) for hidden of shape",
        ),
        ({"hidden": torch.zeros(3, 11, 24, dtype=torch.int64)}, r"hidden has dtype torch.int64"),
        ({"weight": torch.zeros(24)}, r"weight has shape \(24,\), expected"),
        ({"target": torch.zeros(3, 10, dtype=torch.int64)}, r"target has shape \(3, 10\), expected \(3, 11\)"),
        ({"target": torch.zeros(3, 11)}, r"target has dtype torch.float32, expected an integer dtype"),
        ({"target": torch.zeros(3, 11, dtype=torch.int64, device="meta")}, r"target is on meta, expected cpu"),
        ({"bias": torch.zeros(300)}, r"bias has shape \(300,\), expected \(301,\)"),
        ({"old_logp": torch.zeros(3, 10)}, r"old_logp has shape \(3, 10\), expected that of target, \(3, 11\)"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, r"mask has shape \(3,\), expected that of target"),
        ({"advantage": torch.zeros(4)}, r"advantage has shape \(4,\), expected \(3,\) or that of target"),
        ({"token_weight": torch.zeros(3, 10)}, r"token_weight has shape \(3, 10\)"),
        ({"group": None, "reweight": "ppl"}, r"group is None, expected the prompts' ids"),
        ({"ref_logp": None, "kl_beta": 0.1}, r"ref_logp is None, expected a tensor: kl_beta is 0.1"),
        ({"base_hidden": H, "base_weight": W}, r"base_hidden is given, expected None beside ref_logp"),
        ({"base_hidden": H, "ref_logp": None}, r"base_weight is None, expected a tensor"),
        ({"base_weight": W, "ref_logp": None}, r"base_hidden is None, expected a tensor"),
        ({"base_bias": torch.zeros(301), "ref_logp": None}, r"base_hidden is None, expected a tensor"),
        (
            {"base_hidden": H, "base_weight": W[:300], "ref_logp": None},
            r"base_weight has 300 rows, expected the vocabulary of weight \(301 rows\)",
        ),
        (
            {"base_hidden": H, "base_weight": W.clone().requires_grad_(), "ref_logp": None},
            r"base_weight requires a gradient.*base_weight\.detach\(\)",
        ),
        ({"base_hidden": H[:2], "base_weight": W, "ref_logp": None}, r"base_hidden has .*2, 11.*, expected .*3, 11"),
        ({"temperature": 0.0}, r"temperature is 0.0, expected a finite number > 0"),
        ({"softcap": -1.0}, r"softcap is -1.0, expected a finite number > 0"),
        ({"alpha": -0.1}, r"alpha is -0.1, expected a number in \[0, ∞\)"),
        ({"clip_low": -0.2}, r"clip_low is -0.2"),
        ({"loss_type": "ppo"}, r"loss_type is 'ppo', expected one of"),
        ({"num_tokens": 5, "loss_type": "grpo"}, r"num_tokens is given, expected None"),
        ({"num_sequences": 5, "loss_type": "cispo"}, r"num_sequences is given, expected None"),
        ({"offsets": torch.tensor([0, 33])}, r"target has shape \(3, 11\), expected \(N,\) with offsets"),
    ],
)
def test_what_does_not_fit_hidden_states(change, message):
    inputs = linear_policy_cases.make_inputs()
    inputs["weight"].requires_grad_()
    with pytest.raises((ValueError, TypeError), match=message):
        linear_policy_loss(**(inputs | change))


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("label", [-100, -1, 301, -(2**63)])
def test_a_target_outside_of_the_vocabulary_under_the_mask(label, importance):
    inputs = linear_policy_cases.make_inputs()
    inputs["mask"][0] = True
    inputs["target"][0, 1] = label
    message = (
        rf"target\[0, 1\] is {label}, expected a token in \[0, 301\) where the mask is 1: there is no ignore_index"
    )
    with pytest.raises(IndexError, match=message):
        linear_policy_loss(**inputs, importance=importance)
    inputs["mask"][0, 1] = False
    assert linear_policy_loss(**inputs, importance=importance).loss.isfinite()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": torch.tensor([0, 100])}, r"offsets go from 0 to 100, expected numbers from 0 to 17"),
        ({"offsets": torch.tensor([0, 12, 6, 17])}, r"that do not decrease"),
        ({"target": torch.zeros(16, dtype=torch.int64)}, r"target has shape \(16,\), expected \(17,\)"),
        ({"loss_type": "dr_grpo"}, r"max_length is None, expected a number"),
    ],
)
def test_what_does_not_fit_packed_hidden_states(change, message):
    inputs = linear_policy_cases.flat(linear_policy_cases.make_inputs(), [11, 0, 6])
    with pytest.raises((ValueError, TypeError), match=message):
        linear_policy_loss(**(inputs | change))


def test_a_constant_that_requires_a_gradient_will_do_where_none_is_asked_for():
    inputs = without_extras(make_inputs())
    inputs["old_logp"].requires_grad_()
    with torch.no_grad():
        assert not policy_loss(**inputs).loss.requires_grad


@pytest.mark.skipif(backends.unavailable("cpu", "policy_loss_fwd", "cpu") is not None, reason="no compiled extension")
def test_the_op_checks_what_it_reads():
    """Past functional.py: memory safety."""
    inputs = make_inputs()
    tokens = [inputs["logp"], inputs["old_logp"], inputs["advantage"], inputs["mask"]]
    choices, *options = [*PolicyOptions(reweight="none").arguments(), True, 2**20]
    run = torch.ops.dlogp._cpu_policy_loss_fwd
    with pytest.raises(ValueError, match=r"old_logp has shape \[5, 36\], expected \[5, 37\]"):
        run(tokens[0], X, *tokens[2:], *[None] * 7, choices, *options)
    flat = [tokens[0].flatten(), tokens[1].flatten(), tokens[2], tokens[3].flatten()]
    with pytest.raises(ValueError, match=r"offsets\[1\] is 186, expected a number in \[0, 185\]"):
        run(*flat, torch.tensor([0, 186]), *[None] * 6, choices, *options)
    with pytest.raises(ValueError, match=r"group is missing"):
        run(*tokens, *[None] * 7, ["dapo", "ppl", "both", "token"], *options)
    with pytest.raises(ValueError, match="loss_type is 'ppo'"):
        run(*tokens, *[None] * 7, ["ppo", *choices[1:]], *options)
    with pytest.raises(ValueError, match="str_options and float_options have 3 and 8 elements, expected 4 and 8"):
        run(*tokens, *[None] * 7, choices[1:], *options)


def test_module():
    options = {"loss_type": "grpo", "reweight": "ppl", "alpha": 0.4, "kl_beta": 0.1, "clip_high": 0.5}
    inputs = make_inputs()
    module = PolicyLossModule(**options)
    assert torch.equal(module(**inputs).loss, policy_loss(**inputs, **options).loss)
    assert "loss_type=grpo" in repr(module) and not list(module.parameters())


def test_module_of_hidden_states():
    options = {"loss_type": "grpo", "alpha": 0.4, "kl_beta": 0.1, "temperature": 0.7, "softcap": 5.0}
    inputs = linear_policy_cases.make_inputs()
    module = LinearPolicyLoss(**options)
    assert torch.equal(module(**inputs).loss, linear_policy_loss(**inputs, **options).loss)
    assert torch.equal(LinearPolicyLoss()(**inputs).loss, linear_policy_loss(**inputs).loss)
    assert "loss_type=grpo" in repr(module) and "softcap=5.0" in repr(module) and not list(module.parameters())
    with pytest.raises(TypeError, match="unexpected keyword"):
        LinearPolicyLoss(temprature=1.0)
