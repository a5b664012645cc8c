"""`linear_extrapolated_sample` draws what `extrapolated_sample` draws from the logits that are never all there."""

import pytest
import torch
from cases import make_inputs

from dlogp_kernels import backends, extrapolated_sample, linear_extrapolated_sample, reference

V = 1_187
OPTIONS = {"gamma": 0.3, "criterion": "delta_logp", "threshold": -0.2, "top_p": 0.9, "temperature": 0.8, "seed": 2**63}
HEADS = {"softcap": 6.0, "base_softcap": 4.0, "logit_scale": 1.3, "base_logit_scale": 0.6}


def _logits(inputs: dict[str, torch.Tensor], prefix: str) -> torch.Tensor:
    hidden, weight, bias = (inputs[f"{prefix}{name}"] for name in ("hidden", "weight", "bias"))
    raw = reference.linear_logits(hidden, weight, bias, torch.float32)
    return reference.transform_logits(raw, 1.0, HEADS[f"{prefix}softcap"], HEADS[f"{prefix}logit_scale"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("per_row", [False, True])
def test_tokens_are_those_of_the_logits(dtype, per_row):
    inputs = make_inputs("linear_delta_logp", (3, 7), v=V, dtype=dtype)
    del inputs["target"]
    rows = torch.arange(21).view(3, 7)
    where = {"row_id": rows + 100, "step": rows % 5} if per_row else {"step": 4}
    expected = extrapolated_sample(_logits(inputs, ""), _logits(inputs, "base_"), **OPTIONS, **where)
    assert expected.selected.any() and not expected.selected.all()
    for size in (2**20, backends.DEFAULT_WORKSPACE):  # many blocks of rows, one block
        with backends.workspace_limit(size):
            drawn = linear_extrapolated_sample(**inputs, **HEADS, **OPTIONS, **where)
        assert torch.equal(drawn.token, expected.token)
        assert torch.equal(drawn.selected, expected.selected)
        torch.testing.assert_close(drawn.logp, expected.logp, rtol=0, atol=1e-5)
        torch.testing.assert_close(drawn.delta_logp, expected.delta_logp, rtol=0, atol=1e-5)


def test_no_rows():
    inputs = make_inputs("linear_delta_logp", (0, 4), v=V)
    del inputs["target"]
    assert linear_extrapolated_sample(**inputs, seed=1).token.shape == (0, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_weight": torch.zeros(9, 32)}, "base_weight has 9 rows, expected the vocabulary of weight"),
        ({"base_hidden": torch.zeros(2, 32)}, "base_hidden has shape"),
        ({"gamma": -1.0}, "gamma is -1.0, expected a number in"),
        ({"row_id": torch.arange(3)}, "row_id has shape"),
    ],
)
def test_bad_input_is_named(changes, message):
    inputs = make_inputs("linear_delta_logp", 4, v=V, bias=False)
    del inputs["target"]
    with pytest.raises(ValueError, match=message):
        linear_extrapolated_sample(**inputs | {"seed": 1} | changes)
