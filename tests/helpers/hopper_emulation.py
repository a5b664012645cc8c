"""The kernels for Hopper on the CPU: kernels, launchers and bindings are their own source, see hopper_on_cpu.

The ops are then `torch.ops.dlogp._cuda_linear_states` and `_cuda_linear_gradient` for tensors of the CPU.
"""

import ctypes
import functools
import json
import shutil
import subprocess
import tempfile
from ctypes import c_bool, c_int, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cases import Inputs, asked_for, is_pair
from paths import HELPERS, ROOT
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths

from dlogp_kernels import DeltaLogpStats, LogpStats

KERNEL = ROOT / "csrc" / "cuda" / "linear_sm90.cu"
_BINDING = ROOT / "python_bindings" / "linear_cuda.cpp"
_STAND_INS = (HELPERS / "hopper_on_cpu", HELPERS / "cuda_on_cpu")
#: What is of the device in a source, and what takes its place.
_REPLACED = {
    _BINDING: {
        "STABLE_TORCH_LIBRARY_IMPL(dlogp, CUDA, library)": "STABLE_TORCH_LIBRARY_IMPL(dlogp, CPU, library)",
        "is_cuda()": "is_cpu()",
        "const torch::stable::accelerator::DeviceGuard guard(hidden.get_device());": "",
        '#include "../csrc/cuda/': '#include "',
    },
    **{path: {} for path in KERNEL.parent.glob("linear_*.cu*")},
    KERNEL.with_name("linear_forward.cuh"): {'"+f"': '"+m"'},  # a register of a GPU
}
_COMPILER = shutil.which("g++")
WHY_NOT = None if _COMPILER else "no g++"

MASKED_LOGIT = torch.tensor(-1e25).item()
#: In memory that nothing has written; exact in every type.
UNTOUCHED = -28672.0
_MARGIN = 256


class Launch(NamedTuple):
    """Multiprocessors of the GPU, the order in which threads run, and whether copies come as late as they may."""

    multiprocessors: int = 2
    backwards: bool = False
    late_copies: bool = False


_LAUNCH = Launch()


class Launched(NamedTuple):
    blocks: int
    threads: int
    cluster: int
    shared_bytes: int
    allowed_bytes: int


class Forward(NamedTuple):
    """Memory after the kernel, and what was launched: state (3 or 10, splits, R), target_logits (models · K, R).

    `maps`: what cuTensorMapEncodeTiled was given for each matrix: type, rank, address, columns, rows, stride in bytes,
    columns and rows of a box, their steps, interleave, swizzle, promotion, fill.
    """

    state: Tensor
    target_logits: Tensor
    launched: Launched
    maps: list[list[int]]


@functools.cache
def _library() -> ctypes.CDLL:
    assert _COMPILER is not None
    # What is loaded stays when its file is gone.
    with tempfile.TemporaryDirectory(prefix="hopper_on_cpu") as folder:
        for path, replaced in _REPLACED.items():  # apart from the header of instructions: they find the stand-in
            source = path.read_text()
            for old, new in replaced.items():
                assert old in source, f"{old} is not in {path.name} any more"
                source = source.replace(old, new)
            Path(folder, path.name).write_text(source)
        built = Path(folder, "hopper_on_cpu.so")
        headers = (folder, *_STAND_INS, KERNEL.parent, KERNEL.parent.parent, _BINDING.parent, *include_paths())
        sources = [Path(folder, _BINDING.name), *(path / f"{path.name}.cpp" for path in _STAND_INS)]
        flags = [
            "-std=c++20", "-O1", "-march=native", "-fPIC", "-shared", "-pthread", "-DUSE_CUDA",
            "-DTORCH_TARGET_VERSION=0x020b000000000000", *(f"-I{path}" for path in headers),
            *(f"-L{path}" for path in library_paths()),
        ]  # fmt: skip
        subprocess.run([_COMPILER, *flags, *sources, "-ltorch_cpu", "-lc10", "-o", built], check=True)
        torch.ops.load_library(built)
        library = ctypes.CDLL(str(built))
    library.set_launch.argtypes = (c_int, c_bool, c_bool)
    library.report.restype = ctypes.c_char_p
    library.list_units.argtypes = (c_int, c_int, c_void_p, c_int, c_void_p, c_int)
    return library


def units(models: int, blocks: int, shapes: list[tuple[int, int, int, int]]) -> list[Tensor]:
    """(row, split, first tile, end tile) that clusters take in turn, of each one's blocks: (units, blocks, 4).

    Of shapes (rows, vocabulary, splits, groups of a panel).
    """
    most = max((rows // 128 + 2) * splits for rows, _, splits, _ in shapes)
    found = torch.full((len(shapes), most, blocks, 4), -1, dtype=torch.int32)
    given = torch.tensor(shapes)
    _library().list_units(models, blocks, given.data_ptr(), len(shapes), found.data_ptr(), most)
    return [x[x[:, 0, 0] >= 0] for x in found]


def _scales(prefix: str, options: dict[str, Any]) -> tuple[float, float]:
    """tanh_scale, 0 without a softcap, and output_scale."""
    temperature, softcap = options.get("temperature", 1.0), options.get(f"{prefix}softcap")
    logit_scale = options.get(f"{prefix}logit_scale", 1.0)
    return (0.0, logit_scale / temperature) if softcap is None else (logit_scale / softcap, softcap / temperature)


def forward(
    op: str,
    inputs: Inputs,
    splits: int = 2,
    *,
    launch: Launch = _LAUNCH,
    rows: int | None = None,
    row_index: Tensor | None = None,
    num_rows: int | None = None,
    first: int = 0,
    **options: Any,
) -> Forward:
    """The kernel on inputs of cases.py, whose hidden states are those of `rows` states."""
    _library().set_launch(*launch)
    rows = len(inputs["hidden"]) if rows is None else rows
    target = inputs["target"].view(len(inputs["target"]), -1)
    models = 1 + is_pair(op)
    heads = [x for prefix in ("", "base_")[:models] for x in _head(prefix, inputs, models, options)]
    if models == 1:
        heads += [None, None, None, 0.0, 1.0]
    count = None if num_rows is None else torch.tensor([num_rows], dtype=torch.int32)
    shapes = ((10 if is_pair(op) else 3, splits, rows), (models * target.shape[1], rows))
    memory = [torch.full((torch.Size(shape).numel() + 2 * _MARGIN,), UNTOUCHED) for shape in shapes]
    results = [x[_MARGIN:-_MARGIN].view(shape) for x, shape in zip(memory, shapes, strict=True)]
    torch.ops.dlogp._cuda_linear_states(*heads, target, row_index, count, first, *results)
    report = _report()
    for x in memory:
        assert (x[:_MARGIN] == UNTOUCHED).all() and (x[-_MARGIN:] == UNTOUCHED).all(), "written outside"
    return Forward(*results, Launched(*report["launched"]), report["maps"])


def gradient(
    inputs: Inputs,
    row_terms: Tensor,
    target_terms: Tensor,
    first: int,
    first_token: int,
    launch: Launch,
    **options: Any,
) -> Tensor:
    """By the raw logits of one model's rows from `first` on, whose weights count from first_token on."""
    _library().set_launch(*launch)
    hidden, weight = inputs["hidden"], inputs["weight"]
    memory = torch.full((len(hidden) + 64, len(weight) + 64 + -len(weight) % 8), UNTOUCHED, dtype=hidden.dtype)
    untouched = torch.ones_like(memory, dtype=torch.bool)
    result, outside = (x[32 : 32 + len(hidden), 32 : 32 + len(weight)] for x in (memory, untouched))
    outside.fill_(False)
    torch.ops.dlogp._cuda_linear_gradient(
        *_head("", inputs, 1, options), inputs["target"], target_terms, row_terms, first, first_token, result
    )
    _report()
    assert (memory[untouched] == UNTOUCHED).all(), "written outside"
    return result


def _head(prefix: str, inputs: Inputs, models: int, options: dict[str, Any]) -> list[Any]:
    """Arguments of one head, with NaN as the bias of what is no token."""
    hidden, weight, bias = (inputs.get(f"{prefix}{name}") for name in ("hidden", "weight", "bias"))
    if bias is not None:
        padding = -len(bias) % (256 if models == 1 else 160)
        bias = torch.nn.functional.pad(bias.float().clamp_min(MASKED_LOGIT), (0, padding), value=torch.nan)
    return [hidden, weight, bias, *_scales(prefix, options)]


def _report() -> dict[str, Any]:
    report = json.loads(_library().report())
    assert not report["problem"], report["problem"]
    return report


def statistics(op: str, result: Forward, count: int, **options: Any) -> Any:
    """float32 of the first `count` rows, whose splits are merged as `merge` and `merge_pair` of _math.py do."""
    stats = asked_for(_statistics(op, result, count, options))
    return type(stats)(*(x.float() for x in stats))


def _statistics(op: str, result: Forward, count: int, options: dict[str, Any]) -> LogpStats | DeltaLogpStats:
    state, x = result.state[..., :count].double(), result.target_logits[:, :count].double()
    scale, base_scale = (_scales(prefix, options)[1] for prefix in ("", "base_"))
    model = _merged(state[:3], scale)
    if not is_pair(op):
        return LogpStats(_logp(x, model, scale), *_entropy_and_lse(model, scale))
    base = _merged(state[3:6], base_scale)
    k = len(x) // 2
    logp, base_logp = _logp(x[:k], model, scale), _logp(x[k:], base, base_scale)
    shift, base_shift = scale * (state[0] - model.m), base_scale * (state[3] - base.m)
    change = shift - base_shift
    cross = (shift.exp() * (state[6] + change * (1 + state[1]))).sum(0)
    base_cross = (base_shift.exp() * (state[7] - change * (1 + state[4]))).sum(0)
    kl = cross / (1 + model.rest) - model.rest.log1p() + base.rest.log1p()
    reverse_kl = base_cross / (1 + base.rest) - base.rest.log1p() + model.rest.log1p()
    (entropy, lse), (base_entropy, base_lse) = _entropy_and_lse(model, scale), _entropy_and_lse(base, base_scale)
    kl, reverse_kl = (
        x.clamp_min(0).masked_fill(state[flag].amax(0) > 0, torch.inf) for x, flag in ((kl, 8), (reverse_kl, 9))
    )
    return DeltaLogpStats(
        logp - base_logp, logp, base_logp, entropy, base_entropy, kl, reverse_kl, lse, base_lse
    )  # fmt: skip


class _State(NamedTuple):
    m: Tensor
    rest: Tensor
    weighted: Tensor


def _merged(splits: Tensor, scale: float) -> _State:
    m, rest, weighted = splits
    largest = m.amax(0)
    shift, has_m = m - largest, m == largest
    factor = (scale * shift).exp()
    merged_rest = torch.where(has_m, rest, factor * (1 + rest)).sum(0) + (has_m.sum(0) - 1)
    return _State(largest, merged_rest, (factor * (weighted + shift * (1 + rest))).sum(0))


def _logp(x: Tensor, state: _State, scale: float) -> Tensor:
    """(rows, K); (rows,) of one target."""
    logp = scale * (x - state.m) - state.rest.log1p()
    return logp.masked_fill(x <= MASKED_LOGIT, -torch.inf).t().squeeze(1)


def _entropy_and_lse(state: _State, scale: float) -> tuple[Tensor, Tensor]:
    log_sum = state.rest.log1p()
    return log_sum - scale * state.weighted / (1 + state.rest), scale * state.m + log_sum
