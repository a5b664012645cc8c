"""Every kernel compiled for GPUs that are not here, as the launchers launch it: no spills, the instructions it is for.

The launchers run on small tensors of the CPU, for their choice of kernels and arguments; nothing is computed. What is
compiled for a Hopper is looked at where it is launched, in test_launch.py.
"""

import re

import linear_policy_cases
import policy_cases
import pytest
import torch
import triton
import triton.language as tl
from cases import call, gradients, make_inputs, upstream_of
from fake_gpu import GPUS, Kernel, assert_fits, assert_uses, kernels, launch_code_sees, pretend
from triton.tools.tensor_descriptor import TensorDescriptor

import dlogp_kernels
from dlogp_kernels import backends

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@triton.jit
def _product_kernel(
    a, b, c_ptr, D, SIZE: tl.constexpr, BLOCK_D: tl.constexpr, DESCRIPTORS: tl.constexpr
):  # one tile of a · bᵀ
    i, k = tl.arange(0, SIZE), tl.arange(0, BLOCK_D)
    total = tl.zeros([SIZE, SIZE], tl.float32)
    for d in range(0, D, BLOCK_D):
        if DESCRIPTORS:
            left, right = a.load([0, d]), b.load([0, d])
        else:
            left, right = tl.load(a + i[:, None] * D + d + k), tl.load(b + i[:, None] * D + d + k)
        total = tl.dot(left, right.T, total)
    tl.store(c_ptr + i[:, None] * SIZE + i, total)


def _product(gpu: str, size: int, num_warps: int, described: bool = False) -> Kernel:
    a, c = torch.empty(size, 256, dtype=BF16), torch.empty(size, size)
    operand = TensorDescriptor.from_tensor(a, [size, 64]) if described else a
    with pretend(GPUS[gpu]) as launched:
        for _ in range(2):
            _product_kernel[(1,)](operand, operand, c, 256, size, 64, described, num_warps=num_warps)
    (kernel,) = kernels(launched)
    return kernel


@pytest.mark.parametrize("gpu", GPUS)
def test_a_product_uses_the_matrix_units_of_each_gpu(gpu):
    kernel = _product(gpu, 64, 4)
    assert kernel.name == "_product_kernel"
    assert kernel.constants == {"SIZE": 64, "BLOCK_D": 64, "DESCRIPTORS": False}
    assert re.search(GPUS[gpu].matrix_instruction, kernel.assembly)
    assert kernel.spilled == 0 and 16 < kernel.registers <= 256


@pytest.mark.parametrize("gpu", ["sm_90", "sm_100"])
def test_descriptors_become_bulk_copies(gpu):
    assert "cp.async.bulk.tensor" in _product(gpu, 64, 4, described=True).assembly
    assert "cp.async.bulk.tensor" not in _product(gpu, 64, 4, described=False).assembly


@pytest.mark.parametrize("gpu", ["sm_80", "gfx942"])
def test_spills_are_seen(gpu):
    assert _product(gpu, 128, 1).spilled > 0


def test_too_much_shared_memory_is_an_error_as_on_the_gpu():
    with pytest.raises(triton.runtime.errors.OutOfResources, match="shared memory"):
        _product("sm_89", 256, 16, described=False)


VOCABULARY = 151_936  # of Qwen: many splits to merge
EVERY_OPTION = {"k": 3, "bias": True, "options": {"temperature": 0.7, "softcap": 5.0, "logit_scale": 1.3}}
#: Name → backend, op, and what differs from a call with 130 rows (more than a tile), no bias and bfloat16.
LINEAR = {
    "one model": ("triton", "linear_logp", {"v": VOCABULARY, "d": 64, "wanted": ["hidden"]}),
    "one model, whole tiles, few rows": ("triton", "linear_logp", {"v": 4096, "d": 256, "n": 5}),
    "one model, unaligned, every option": ("triton", "linear_logp", {"v": 1187, "d": 45, **EVERY_OPTION}),
    "one model, float32": ("triton", "linear_logp", {"v": 1187, "d": 256, "dtype": FP32}),
    "pair": ("triton", "linear_delta_logp", {"v": VOCABULARY, "d": 64, "wanted": ["hidden"]}),
    "pair, whole tiles, few rows": ("triton", "linear_delta_logp", {"v": 4096, "d": 256, "n": 5}),
    "pair, unaligned, every option": ("triton", "linear_delta_logp", {"v": 1187, "d": 45, **EVERY_OPTION}),
    "pair, float32": ("triton", "linear_delta_logp", {"v": 1187, "d": 256, "dtype": FP32}),
}
LAUNCHES = LINEAR | {
    "logits": ("triton", "logp", {"v": VOCABULARY, "n": 3}),
    "logits of a pair": ("triton", "delta_logp", {"v": VOCABULARY, "n": 3}),
}


def _launched(gpu: str, name: str) -> list[Kernel]:
    """What forward and backward launch on this GPU."""
    backend, op, changes = LAUNCHES[name]
    case = {"shape": changes.get("n", 130), "dtype": BF16, "bias": False}
    case |= {x: value for x, value in changes.items() if x not in ("n", "options", "wanted")}
    options, inputs = changes.get("options", {}), make_inputs(op, **case)
    with pretend(GPUS[gpu]) as launched, launch_code_sees(GPUS[gpu]), backends.use_backend(backend):
        stats = call(op, inputs, **options)
        gradients(op, inputs, upstream_of(stats), wanted=changes.get("wanted"), **options)
    return kernels(launched)


POLICY = {
    "policy loss": ({}, {}),
    "policy loss, every option": ({"reweight": "ppl", "importance": "sequence", "dual_clip": 3.0}, {"packed": True}),
    "policy loss, sapo": ({"loss_type": "sapo", "reweight": "dominate", "alpha": 0.5}, {"dtype": BF16}),
    "policy loss, cispo": ({"loss_type": "cispo", "importance": "sequence"}, {"dtype": FP16}),
    "policy loss, gspo-token": ({"loss_type": "grpo", "importance": "sequence_token", "num_sequences": 7}, {}),
}


@pytest.mark.parametrize("gpu", ["sm_80", "gfx942"])
@pytest.mark.parametrize("name", POLICY)
def test_the_policy_loss_fits(gpu, name):
    options, layout = POLICY[name]
    inputs = policy_cases.make_inputs(3, 4096, dtype=layout.get("dtype", FP32))
    if layout.get("packed"):
        inputs = policy_cases.pack(inputs, [4096, 1, 17])
    with pretend(GPUS[gpu]) as launched, launch_code_sees(GPUS[gpu]), backends.use_backend("triton"):
        policy_cases.call(inputs, **options, **policy_cases.ALL_EXTRAS)
    before = ["_sequences_kernel"] if "importance" in options else []
    assert [x.compiled.name for x in launched] == [*before, "_policy_loss_fwd_kernel", "_policy_loss_bwd_kernel"]
    for kernel in kernels(launched):
        assert_fits(gpu, kernel)
        assert_uses(gpu, kernel, aligned=True)


@pytest.mark.parametrize("columns", [4096, 48])
def test_the_policy_loss_loads_several_tokens_at_once(columns):
    """Of rows that are aligned, whatever their number: with these a kernel knows it without being compiled anew."""
    inputs = policy_cases.without_extras(policy_cases.make_inputs(3, columns))
    with pretend(GPUS["sm_90"]) as launched, launch_code_sees(GPUS["sm_90"]), backends.use_backend("triton"):
        policy_cases.call(inputs)
    for kernel in kernels(launched):
        assert re.search(r"ld\.global\.v4", kernel.assembly) and re.search(r"st\.global\.v4", kernel.assembly)


def test_the_policy_loss_of_other_numbers_is_compiled_already():
    def compiled(sequences: int, columns: int, lengths: list[int] | None, **options: float) -> set[int]:
        inputs = policy_cases.make_inputs(sequences, columns)
        inputs = inputs if lengths is None else policy_cases.pack(inputs, lengths)
        with pretend(GPUS["sm_90"]) as launched, launch_code_sees(GPUS["sm_90"]), backends.use_backend("triton"):
            policy_cases.call(inputs, loss_type="dr_grpo", **options, **policy_cases.ALL_EXTRAS)
        return {id(x.compiled) for x in launched}

    padded = compiled(3, 4096, None, max_length=4096, alpha=0.1)
    assert compiled(16, 48, None, max_length=1, alpha=1.0) == padded
    packed = compiled(3, 32, [32, 5, 16], max_length=16, alpha=0.1)
    assert compiled(2, 32, [3, 4], max_length=7, alpha=16.0) == packed
    assert compiled(1, 32, [1], max_length=1, alpha=1.0) == packed


LINEAR_POLICY = {
    "one model": ({"loss_type": "sapo"}, {}),
    "pair": ({"reweight": "ppl", "dual_clip": 3.0}, {"base": True}),
    "float16": ({"loss_type": "cispo", "kl_beta": 0.3}, {"dtype": FP16}),
}


@pytest.mark.parametrize("name", LINEAR_POLICY)
def test_the_linear_policy_loss_fits(name):
    options, changes = LINEAR_POLICY[name]
    inputs = linear_policy_cases.make_inputs(3, 40, v=9_001, d=64, **({"dtype": BF16} | changes))
    with pretend(GPUS["sm_80"]) as launched, launch_code_sees(GPUS["sm_80"]), backends.use_backend("triton"):
        linear_policy_cases.call(inputs, entropy_coef=0.1, **options)
    compiled = kernels(launched)
    assert "_policy_rows_kernel" in {x.name for x in compiled}
    for kernel in compiled:
        assert_fits("sm_80", kernel)


#: Name → options of a draw from hidden states, and what differs from a call with 5 rows, no bias and bfloat16.
SAMPLING = {
    "draws": ({"gamma": 0.1, "criterion": "delta_logp", "threshold": -0.3}, {"v": VOCABULARY, "d": 256}),
    "draws, by divergence": ({"gamma": 0.1, "criterion": "kl", "threshold": 0.1}, {"v": 4096, "d": 256, "n": 130}),
    "draws, float32": ({"gamma": 0.1, "criterion": "avg_kl", "threshold": 0.1}, {"v": 4099, "d": 256, "dtype": FP32}),
}


def _sampled(gpu: str, name: str) -> list[Kernel]:
    options, changes = SAMPLING[name]
    case = {"shape": changes.get("n", 5), "dtype": BF16, "bias": False}
    inputs = make_inputs("linear_delta_logp", **case | {x: y for x, y in changes.items() if x != "n"})
    del inputs["target"]
    with pretend(GPUS[gpu]) as launched, launch_code_sees(GPUS[gpu]), backends.use_backend("triton"):
        dlogp_kernels.linear_extrapolated_sample(
            **inputs, seed=torch.tensor([1]), step=torch.arange(len(inputs["hidden"])), **options
        )
    return kernels(launched)


CASES = [
    *((gpu, name) for gpu in ("sm_80", "sm_100") for name in LINEAR),
    *(("gfx942", name) for name in ("one model", "pair", "one model, float32", "logits", "logits of a pair")),
    *(("sm_89", name) for name in ("one model", "pair", "one model, float32", "pair, float32")),
    *((gpu, name) for gpu in ("sm_80", "sm_100") for name in ("draws", "draws, float32")),
    *((gpu, "draws, by divergence") for gpu in ("sm_89", "sm_100", "gfx942")),
]


@pytest.mark.parametrize(("gpu", "name"), CASES, ids=[f"{gpu} {name}" for gpu, name in CASES])
def test_kernels_fit_and_multiply_on_tensor_cores(gpu, name, record_property):
    launched = (_sampled if name in SAMPLING else _launched)(gpu, name)
    assert launched
    for kernel in launched:
        record_property(f"{kernel.name} registers, spilled, shared memory", kernel[3:])
        assert_fits(gpu, kernel)
        assert_uses(gpu, kernel, "unaligned" not in name)


@pytest.mark.parametrize("gpu", ["sm_80", "sm_100", "gfx942"])
def test_sampling_fits(gpu, record_property):
    logits = torch.randn(3, VOCABULARY, dtype=BF16)
    with pretend(GPUS[gpu]) as launched, launch_code_sees(GPUS[gpu]), backends.use_backend("triton"):
        dlogp_kernels.extrapolated_sample(logits, logits, seed=7, top_k=50, top_p=0.7, min_p=0.1, temperature=0.8)
    (kernel,) = kernels(launched)
    record_property(f"{kernel.name} registers, spilled, shared memory", kernel[3:])
    assert_fits(gpu, kernel)
