"""Random shapes, dtypes, layouts and options of each op against float64 truth. A seed that fails fails again."""

import random

import cases
import pytest
import torch
from cases import ALL_OPTIONS, OPS, check_against_truth, fewer, floating, make_inputs, options_for

DTYPES = (torch.bfloat16, torch.bfloat16, torch.float16, torch.float32, torch.float32, torch.float64)


def _random_case(op: str, rng: random.Random, exact: torch.dtype) -> tuple[dict, dict]:
    shape = rng.choice(((), (1,), (2,), (33,), (70,), (1, 1), (3, 8), (2, 17), (1, 2, 5), (4, 3, 2)))
    v = rng.choice((1, 2, rng.randint(3, 70), rng.randint(70, 1500), rng.randint(*fewer((1500, 9000), (150, 900)))))
    dtypes = [exact if dtype == torch.float64 else dtype for dtype in DTYPES]
    common = rng.choice(dtypes)
    names = floating(make_inputs(op, 1))
    dtype = {name: rng.choice(dtypes) if rng.random() < 0.2 else common for name in names}
    inputs = make_inputs(
        op,
        shape,
        v=v,
        d=rng.choice((1, 2, 7, 16, 33, 64, 129)),
        k=rng.choice((None, None, 1, 2, 5)),
        dtype=dtype,
        bias=rng.random() < 0.5,
        spread=rng.choice((0.1, 1.0, 3.0, 10.0)),
        seed=rng.randrange(2**31),
    )
    ignored = torch.rand(inputs["target"].shape, generator=torch.Generator().manual_seed(0)) < rng.choice((0, 0.3, 0.9))
    inputs["target"] = inputs["target"].masked_fill(ignored, -100)
    for name in floating(inputs):
        if inputs[name].dim() > 1 and rng.random() < 0.3:
            inputs[name] = inputs[name].transpose(0, -1).contiguous().transpose(0, -1)
    options = {name: x * rng.choice((0.5, 1.0, 2.0)) for name, x in ALL_OPTIONS.items() if rng.random() < 0.4}
    return inputs, options_for(op, options) | ({"top": True} if rng.random() < 0.5 else {})


# On a GPU most cases are a kernel to compile.
@pytest.mark.parametrize("seed", range(10 if cases.DEVICE.type == "cuda" else fewer(40, 3)))
@pytest.mark.parametrize("op", OPS)
def test_random_case(accuracy, exact, op, seed):
    inputs, options = _random_case(op, random.Random(f"{op} {seed}"), exact)
    print({name: (tuple(x.shape), x.dtype) for name, x in inputs.items()}, options)
    check_against_truth(accuracy, op, inputs, **options)
