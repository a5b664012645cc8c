"""Calls of every op of the CPU with whatever may come, through kernels that are compiled with sanitizers.

`make sanitize` builds them (`DLOGP_BUILD=asan`) and runs this. A round sets the number of threads and makes a few calls
at the same time, each from a thread that has used torch before. A call is either right, then it has to return, or wrong
in one place, then it has to raise; what a sanitizer finds ends the process, and the calls of its round are told. It is
a function of the seed and its number: `--first` begins with that round. Not looked for: races, and what is read before
it is written (the other tests fill allocations with NaN for that).
"""

import argparse
import importlib.machinery
import importlib.util
import math
import os
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
BUILT = ROOT / "build" / "asan"
#: Names the file that holds the calls of the round at work.
_ROUND = "DLOGP_SANITIZED_ROUND"
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_SIZES = (1, 2, 3, 7, 16, 33, 64, 70)
_VOCABULARIES = (1, 2, 5, 63, 64, 65, 300, 1031)
_ROWS = (0, 1, 2, 3, 5, 17, 33)
#: What wrong input may be told by.
_REFUSALS = (ValueError, TypeError, IndexError)
Arguments = dict[str, Any]


def load_sanitized() -> None:
    """In the place of `dlogp_kernels._cpu`, before anything imports that."""
    name = "dlogp_kernels._cpu"
    (path,) = BUILT.glob("dlogp_kernels/_cpu*.so")
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    loader.exec_module(sys.modules[name])


class Call:
    """One call of a public function, drawn from `draw`: its arguments, what is wrong with them, and its backward."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.generator = torch.Generator().manual_seed(draw.getrandbits(32))
        self.op = draw.choice(_OPS)
        self.mistake = ""
        self.workspace = draw.choice((2**20, 2**20, 2**28))
        self.arguments: Arguments = _MAKERS[self.op](self)
        if draw.random() < 0.2:
            self.spoil()

    def __str__(self) -> str:
        shown = {
            name: f"{tuple(x.shape)} {x.stride()} +{x.storage_offset()} {x.dtype}" if isinstance(x, Tensor) else x
            for name, x in self.arguments.items()
        }
        return f"{self.op}({shown}){' with ' * bool(self.mistake)}{self.mistake}"

    def run(self) -> bool:
        """Whether it returned; AssertionError where it should not have, or should."""
        import dlogp_kernels

        with dlogp_kernels.backends.workspace_limit(self.workspace):
            try:
                self._differentiate(getattr(dlogp_kernels, self.op)(**self.arguments))
            except _REFUSALS:
                if not self.mistake:
                    raise
                return False
        assert not self.mistake, f"nothing was raised: {self}"
        return True

    def _differentiate(self, result: Any) -> None:
        outputs = [x for x in result if isinstance(x, Tensor) and x.requires_grad]
        chosen = [x for x in outputs if self.draw.random() < 0.6] or outputs
        leaves = [x for x in self.arguments.values() if isinstance(x, Tensor) and x.requires_grad]
        if chosen and leaves:
            torch.autograd.grad(chosen, leaves, [self.normal(x.shape, x.dtype) for x in chosen], allow_unused=True)

    def normal(self, shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(tuple(shape), generator=self.generator).to(dtype)

    def floating(self, *shape: int, scale: float = 1.0, gradient: bool = False) -> Tensor:
        x = self.laid_out(self.normal(shape, self.draw.choice(_DTYPES)) * scale)
        return x.requires_grad_() if gradient and self.draw.random() < 0.5 else x

    def laid_out(self, x: Tensor) -> Tensor:
        """The same values at other strides and offsets."""
        layout = self.draw.choice(("whole", "offset", "transposed", "gaps", "wide", "expanded"))
        if layout == "whole" or x.dim() == 0:
            return x
        if layout == "offset":
            first = self.draw.choice((1, 2, 3, 5))
            return torch.cat([x.new_zeros(first), x.flatten()])[first:].view(x.shape)
        if layout == "transposed":
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        if layout == "gaps":
            return torch.stack([x, x], -1)[..., self.draw.randrange(2)]
        if layout == "wide":
            return torch.cat([x, x], -1)[..., : x.shape[-1]]
        return x[:1].expand(x.shape) if x.shape[0] > 0 else x

    def integers(self, end: int, *shape: int) -> Tensor:
        x = torch.randint(max(end, 1), shape, generator=self.generator)
        narrow = end <= 100 and self.draw.random() < 0.3
        return self.laid_out(x.to(self.draw.choice((torch.int32, torch.int8, torch.uint8))) if narrow else x)

    def perhaps(self, make: Callable[[], Any], likely: float = 0.5) -> Any:
        return make() if self.draw.random() < likely else None

    def leading(self) -> tuple[int, ...]:
        rows = self.draw.choice(_ROWS)
        return self.draw.choice(((rows,), (rows,), (1, rows), (rows, 2), (2, 1, rows), ()))

    def transform(self, *prefixes: str) -> Arguments:
        options: Arguments = {}
        for prefix in prefixes:
            options[f"{prefix}softcap"] = self.perhaps(lambda: self.draw.choice((0.5, 30.0)), 0.3)
            options[f"{prefix}logit_scale"] = self.draw.choice((1.0, 1.0, 0.3, 5.0))
        return options

    def head(self, prefix: str, leading: tuple[int, ...], vocabulary: int) -> Arguments:
        width = self.draw.choice(_SIZES)
        return {
            f"{prefix}hidden": self.floating(*leading, width, gradient=True),
            f"{prefix}weight": self.floating(vocabulary, width, scale=2 / math.sqrt(width), gradient=True),
            f"{prefix}bias": self.perhaps(lambda: self.floating(vocabulary, gradient=True)),
        }

    def target(self, leading: tuple[int, ...], vocabulary: int) -> Arguments:
        candidates = self.draw.choice(((), (), (1,), (3,)))
        target = self.integers(vocabulary, *leading, *candidates)
        ignored = self.draw.choice((-100, -1, 0, 2**63 - 1, -(2**63)))
        if target.dtype == torch.int64 and self.draw.random() < 0.5:
            target = torch.where(torch.rand(target.shape, generator=self.generator) < 0.3, ignored, target)
        return {"target": target, "ignore_index": ignored, "temperature": self.draw.choice((1.0, 0.6, 3.0))}

    def drawing(self, leading: tuple[int, ...]) -> Arguments:
        criterion = self.draw.choice(_CRITERIA)
        threshold = None if criterion in ("all", "none") else -0.2 if criterion == "delta_logp" else 0.4
        rows = math.prod(leading)
        return {
            "gamma": self.draw.choice((0.0, 0.0, 0.3)),
            "criterion": criterion,
            "threshold": threshold,
            "draft": self.draw.choice(("base", "rl")),
            "temperature": self.draw.choice((1.0, 0.0, 0.7)),
            "top_k": self.draw.choice((0, 0, 1, 5, 10**9)),
            "top_p": self.draw.choice((1.0, 1.0, 0.7, 1e-9)),
            "min_p": self.draw.choice((0.0, 0.0, 0.1, 1.0)),
            "seed": self.draw.choice((self.draw.getrandbits(64), torch.tensor(self.draw.getrandbits(63)))),
            "row_id": self.perhaps(lambda: self.laid_out(torch.arange(rows).view(leading) + self.draw.getrandbits(31))),
            "step": self.draw.choice((0, 2**32 - 1, torch.tensor([7]), self.integers(1000, *leading))),
        }

    def losses(self, shape: tuple[int, ...], sequences: int, packed: bool) -> Arguments:
        loss_type = self.draw.choice(("dapo", "grpo", "bnpo", "dr_grpo", "cispo", "sapo"))
        by_tokens = loss_type in ("dapo", "bnpo", "cispo")
        per_sequence = self.draw.random() < 0.5
        mask = torch.rand(shape, generator=self.generator) < self.draw.choice((0.0, 0.5, 0.9))
        numbers = (5, 3.5, torch.tensor(9.0), torch.tensor([4]))
        return {
            "old_logp": self.floating(*shape).clamp_max(0.0),
            "advantage": self.floating(sequences) if per_sequence else self.floating(*shape),
            "mask": self.laid_out(self.draw.choice((mask, mask, mask.float(), mask.to(torch.int32)))),
            "loss_type": loss_type,
            "reweight": self.draw.choice(("low_prob", "dominate", "ppl", "none")),
            "reweight_sign": self.draw.choice(("both", "positive", "negative")),
            "group": self.integers(3, sequences),
            "dual_clip": self.perhaps(lambda: 1.5),
            "importance": self.draw.choice(("token", "sequence", "sequence_token")),
            "entropy_coef": self.draw.choice((0.0, 0.1)),
            "kl_beta": self.draw.choice((0.0, 0.2)),
            "token_weight": self.perhaps(lambda: self.floating(*shape)),
            "num_tokens" if by_tokens else "num_sequences": self.perhaps(lambda: self.draw.choice(numbers)),
            "max_length": 50 if loss_type == "dr_grpo" or self.draw.random() < 0.3 else None,
            "offsets": self.offsets(shape[0], sequences) if packed else None,
        }

    def offsets(self, tokens: int, sequences: int) -> Tensor:
        inner = sorted(self.draw.randrange(tokens + 1) for _ in range(sequences - 1))
        return torch.tensor([[0, *inner, tokens]] * 2).t()[:, self.draw.randrange(2)]

    def shape_of_tokens(self) -> tuple[tuple[int, ...], int, bool]:
        packed = self.draw.random() < 0.4
        sequences, columns = self.draw.choice((1, 2, 5)), self.draw.choice((0, 1, 3, 37, 300, 2000))
        return ((columns,) if packed else (sequences, columns)), sequences, packed

    def spoil(self) -> None:
        """Make one thing wrong that has to be refused."""
        names = [name for name, x in self.arguments.items() if isinstance(x, Tensor) and x.numel() > 0]
        if not names:
            return
        name = self.draw.choice(names)
        x = self.arguments[name].detach()
        self.mistake, spoilt = self.draw.choice(_MISTAKES)(self, name, x)
        if self.mistake:
            self.arguments[name] = spoilt
            self.mistake = f"{self.mistake} of {name}"


def _taken_away(call: Call, name: str, x: Tensor) -> tuple[str, Any]:
    held = x.clone()
    held.untyped_storage().resize_(0)
    return "no storage", held


def _cut_short(call: Call, name: str, x: Tensor) -> tuple[str, Any]:
    held = torch.cat([x.flatten(), x.flatten()])
    view = held[1 : 1 + x.numel()].view(x.shape)
    held.untyped_storage().resize_(x.numel() * x.itemsize)
    return "a storage of an element less", view


def _at_an_odd_address(call: Call, name: str, x: Tensor) -> tuple[str, Any]:
    if name not in ("hidden", "weight", "bias", "logits", "base_hidden", "base_weight", "base_logits"):
        return "", x
    data = bytearray(x.numel() * x.itemsize + 1)
    return "an odd address", torch.frombuffer(data, dtype=x.dtype, offset=1).view(x.shape)


def _longer(call: Call, name: str, x: Tensor) -> tuple[str, Any]:
    if name not in _OF_ONE_LENGTH or x.dim() == 0:
        return "", x
    return "another shape", torch.cat([x, x[:1]])


def _of_another_kind(call: Call, name: str, x: Tensor) -> tuple[str, Any]:
    return "a dtype that does not fit", x.to(torch.complex64)


def _out_of_range(call: Call, name: str, x: Tensor) -> tuple[str, Any]:
    if name not in ("target", "row_id", "offsets") or ("mask" in call.arguments and name == "target"):
        return "", x
    wrong = x.to(torch.int64).clone(memory_format=torch.contiguous_format)
    wrong.view(-1)[call.draw.randrange(wrong.numel())] = call.draw.choice((2**40, -7, 2**62))
    return "a number out of range", wrong


#: Of no other one, whatever the other tensors are.
_OF_ONE_LENGTH = (
    "bias", "base_bias", "base_weight", "base_logits", "row_id", "old_logp", "mask", "group", "entropy", "token_weight",
)  # fmt: skip
_MISTAKES = (_taken_away, _cut_short, _at_an_odd_address, _longer, _of_another_kind, _out_of_range)
_CRITERIA = ("delta_logp", "kl", "reverse_kl", "avg_kl", "entropy", "rl_entropy", "random", "all", "none")


def _linear_logp(call: Call) -> Arguments:
    leading, vocabulary = call.leading(), call.draw.choice(_VOCABULARIES)
    return call.head("", leading, vocabulary) | call.target(leading, vocabulary) | call.transform("")


def _linear_delta_logp(call: Call) -> Arguments:
    leading, vocabulary = call.leading(), call.draw.choice(_VOCABULARIES)
    heads = call.head("", leading, vocabulary) | call.head("base_", leading, vocabulary)
    return heads | call.target(leading, vocabulary) | call.transform("", "base_")


def _logp(call: Call) -> Arguments:
    leading, vocabulary = call.leading(), call.draw.choice(_VOCABULARIES)
    logits = {"logits": call.floating(*leading, vocabulary, scale=3.0, gradient=True)}
    return logits | call.target(leading, vocabulary) | call.transform("")


def _delta_logp(call: Call) -> Arguments:
    leading, vocabulary = call.leading(), call.draw.choice(_VOCABULARIES)
    names = ("logits", "base_logits")
    logits = {name: call.floating(*leading, vocabulary, scale=3.0, gradient=True) for name in names}
    return logits | call.target(leading, vocabulary) | call.transform("", "base_")


def _extrapolated_sample(call: Call) -> Arguments:
    leading, vocabulary = call.leading(), call.draw.choice(_VOCABULARIES)
    logits = {name: call.floating(*leading, vocabulary, scale=3.0) for name in ("logits", "base_logits")}
    return logits | call.drawing(leading)


def _linear_extrapolated_sample(call: Call) -> Arguments:
    leading, vocabulary = call.leading(), call.draw.choice(_VOCABULARIES)
    heads = call.head("", leading, vocabulary) | call.head("base_", leading, vocabulary)
    return heads | call.transform("", "base_") | call.drawing(leading)


def _policy_loss(call: Call) -> Arguments:
    shape, sequences, packed = call.shape_of_tokens()
    exact = call.draw.random() < 0.5
    return call.losses(shape, sequences, packed) | {
        "logp": call.floating(*shape, gradient=True),
        "entropy": call.floating(*shape, gradient=True),
        "kl": call.floating(*shape, gradient=True) if exact else None,
        "ref_logp": None if exact else call.floating(*shape),
    }


def _linear_policy_loss(call: Call) -> Arguments:
    shape, sequences, packed = call.shape_of_tokens()
    shape = tuple(min(size, 40) for size in shape)
    vocabulary, exact = call.draw.choice(_VOCABULARIES), call.draw.random() < 0.5
    base = call.head("base_", shape, vocabulary) if exact else {"ref_logp": call.floating(*shape)}
    frozen = {name: None if x is None else x.detach() for name, x in base.items()}
    heads = call.head("", shape, vocabulary) | call.transform(*(("", "base_") if exact else ("",)))
    target = {"target": call.integers(vocabulary, *shape), "temperature": call.draw.choice((1.0, 0.7))}
    return call.losses(shape, sequences, packed) | heads | target | frozen


_MAKERS: dict[str, Callable[[Call], Arguments]] = {
    "linear_logp": _linear_logp,
    "linear_delta_logp": _linear_delta_logp,
    "logp": _logp,
    "delta_logp": _delta_logp,
    "extrapolated_sample": _extrapolated_sample,
    "linear_extrapolated_sample": _linear_extrapolated_sample,
    "policy_loss": _policy_loss,
    "linear_policy_loss": _linear_policy_loss,
}
_OPS = tuple(_MAKERS)


def fuzz(calls: int, seed: int, first: int) -> str:
    """Rounds of a few calls until there were so many; what came of them."""
    import dlogp_kernels

    assert dlogp_kernels.backends.select("logp_fwd", "cpu") == "cpu", "the sanitized extension is not in use"
    number, made, returned = first, 0, 0
    while made < calls:
        draw = random.Random(f"{seed} {number}")
        batch = [Call(draw) for _ in range(draw.choice((1, 1, 2, 3)))]
        with open(os.environ[_ROUND], "w", encoding="utf-8") as note:
            note.write("\n".join([f"round {number} of seed {seed}:", *map(str, batch)]))
        returned += sum(run_together(batch, draw.choice((1, 2, 3, 8))))
        made, number = made + len(batch), number + 1
    return (
        f"{made} calls in {number - first} rounds of seed {seed}: {returned} returned, {made - returned} were refused"
    )


def run_together(batch: list[Call], threads: int) -> list[bool]:
    """Each call from a new thread that knows another number of threads than there is now, one call from this thread."""
    if len(batch) == 1:
        torch.set_num_threads(threads)
        return [batch[0].run()]
    with ThreadPoolExecutor(len(batch)) as pool:
        barrier = threading.Barrier(len(batch))
        list(pool.map(lambda _: (torch.ones(40_000).sum(), barrier.wait()), batch))
        torch.set_num_threads(threads)
        return list(pool.map(Call.run, batch))


def run_sanitized(arguments: list[str]) -> int:
    """This file in a process that the sanitizers' library is loaded into first; its status."""
    compiler = os.environ.get("CXX", "g++")
    paths = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    with tempfile.NamedTemporaryFile(mode="r", prefix="round") as note:
        # Python and torch leave memory behind when they end, which is no fault of a call.
        options = {
            "LD_PRELOAD": " ".join(paths),
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "PYTHONPATH": str(ROOT),
            _ROUND: note.name,
        }
        status = subprocess.run([sys.executable, __file__, *arguments], env=os.environ | options).returncode
        if status != 0:
            print(f"status {status} in {note.read()}", file=sys.stderr)
        return status


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first round")
    given = parser.parse_args()
    if _ROUND not in os.environ:
        sys.exit(1 if run_sanitized(sys.argv[1:]) else 0)
    load_sanitized()
    print(fuzz(given.calls, given.seed, given.first))
