"""What a run on a GPU measures, the most important first: whatever time runs out on is left out."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .. import bench_linear_policy_loss, bench_policy_loss
from ..policy import DAPO
from ..shapes import SHAPES, Shape, Workload

_OPS = ("linear_logp", "linear_delta_logp")
_LOGITS_OPS = ("logp", "delta_logp")
#: Filters of the sampling cases, as the variants of a workload.
FILTERS = ("top-p 0.7", "no truncation")


@dataclass(frozen=True)
class Case:
    """One workload and how to look at it. `seconds` of rounds, at least `rounds` of them; after `patience` seconds no
    further candidate begins.

    Kinds: "compare" (our backends, eager PyTorch, the floor), "peers" (other libraries and torch.compile), "small"
    (also the host's time), "sample" (a step of decoding; other samplers), "policy loss" (of log-probabilities that are
    given, beside a copy), "policy step" (the same loss from hidden states, beside bare products and other libraries),
    "half ignored", "ceilings" (of the machine), "tune" (tile configurations).
    """

    kind: str
    work: Workload
    seconds: float = 2.0
    patience: float = 45.0
    rounds: int = 5
    #: Of a policy loss: how many responses the tokens are of.
    sequences: int = 1

    @property
    def label(self) -> str:
        return f"{self.kind}: {self.work}"


@dataclass(frozen=True)
class Sizes:
    """The workloads of a run, scaled: `REAL`, or `TINY`, which goes through all of it on a CPU in seconds."""

    head: Shape
    n: int
    others: tuple[Shape, ...]
    small: tuple[int, ...]
    long: int
    #: Tokens for float32, which the GPU multiplies more than ten times slower.
    float32_n: int
    #: Rows that are sampled at once.
    batches: tuple[int, ...]
    #: Responses and their tokens, of a policy loss whose log-probabilities are given.
    responses: tuple[int, int]
    #: Elements of a side of the matrices that the machine's ceilings are measured with.
    ceiling: int
    dtype: str = "bfloat16"
    #: Rounds once and briefly: what is timed then is not to be looked at.
    hurried: bool = False

    def sample(self, rows: int, variant: str) -> Workload:
        return Workload("extrapolated_sample", self.head, rows, self.dtype, variant=variant)

    @property
    def policy_loss(self) -> Workload:
        sequences, tokens = self.responses
        shape = Shape(f"B={sequences} T={tokens}", 0, 0)
        return Workload(bench_policy_loss.OP, shape, sequences * tokens, "float32", training=True, variant=DAPO.label)

    @property
    def policy_step(self) -> Workload:
        return self.main(bench_linear_policy_loss.OP, training=True)

    def main(self, op: str, training: bool = False) -> Workload:
        """An op on the shape of the table."""
        return Workload(op, self.head, self.n, self.dtype, training)


REAL = Sizes(
    head=SHAPES["qwen3-8b"],
    n=8192,
    others=tuple(shape for name, shape in SHAPES.items() if name != "qwen3-8b"),
    small=(1, 8, 64),
    long=65536,
    float32_n=2048,
    batches=(1, 8, 64, 128, 512),
    responses=(256, 4096),
    ceiling=8192,
)
TINY = Sizes(
    head=Shape("tiny", 16, 300),
    n=24,
    others=(Shape("tiny capped", 8, 200, softcap=5.0),),
    small=(1,),
    long=48,
    float32_n=8,
    batches=(1, 3),
    responses=(2, 16),
    ceiling=64,
    dtype="float32",
    hurried=True,
)


def plan(sizes: Sizes) -> list[Case]:
    return [_paced(case, sizes) for case in _plan(sizes)]


def tuning_plan(sizes: Sizes) -> list[Case]:
    """Tile configurations of the two fused forward kernels at two shapes."""
    works = [Workload(op, shape, sizes.n, sizes.dtype) for op in _OPS for shape in (sizes.head, sizes.others[0])]
    return [_paced(_ceilings(sizes), sizes), *(_paced(Case("tune", work, 6.0, 90.0), sizes) for work in works)]


def _paced(case: Case, sizes: Sizes) -> Case:
    return replace(case, seconds=0.0, rounds=1) if sizes.hurried else case


def _ceilings(sizes: Sizes) -> Case:
    side = sizes.ceiling
    return Case("ceilings", Workload("linear_ceilings", Shape("square", side, side), side, sizes.dtype))


def _plan(sizes: Sizes) -> Iterator[Case]:
    yield _ceilings(sizes)
    for training in (False, True):
        for op in _OPS:
            yield Case("compare", sizes.main(op, training))
    for op in _LOGITS_OPS:
        yield Case("compare", sizes.main(op))
    for op in _OPS:
        for n in sizes.small:
            yield Case("small", Workload(op, sizes.head, n, sizes.dtype))
    for variant in FILTERS:
        for rows in sizes.batches:
            yield Case("sample", sizes.sample(rows, variant))
    yield Case("policy loss", sizes.policy_loss, sequences=sizes.responses[0])
    # One of the libraries has something compiled.
    yield Case("policy step", sizes.policy_step, 4.0, patience=75.0, sequences=bench_linear_policy_loss.SEQUENCES)
    # Compilers of other libraries take most of the time; a pair needs nothing compiled that one model has not.
    for op in _OPS:
        yield Case("peers", sizes.main(op), 4.0, patience=75.0)
    for op in _LOGITS_OPS:
        yield Case("compare", sizes.main(op, training=True))
    for op in _OPS:
        yield Case("compare", Workload(op, sizes.head, sizes.long, sizes.dtype))
    yield Case("peers", sizes.main("linear_logp", training=True), 4.0, patience=90.0)
    yield Case("half ignored", sizes.main("linear_logp"))
    for shape in sizes.others:
        for op in _OPS:
            yield Case("compare", Workload(op, shape, sizes.n, sizes.dtype))
    yield Case("compare", Workload("linear_logp", sizes.head, sizes.n, "float16"))
    yield Case("compare", Workload("linear_logp", sizes.head, sizes.float32_n, "float32"))
    yield Case("peers", sizes.main("linear_delta_logp", training=True), 4.0, patience=60.0)
    for op in _LOGITS_OPS:
        yield Case("peers", sizes.main(op))
    for shape in sizes.others:
        yield Case("compare", Workload("linear_logp", shape, sizes.n, sizes.dtype, training=True))
    for op in _LOGITS_OPS:
        yield Case("peers", sizes.main(op, training=True))
