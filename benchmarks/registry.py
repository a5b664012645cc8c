"""The benchmarks by op."""

from . import bench_delta_logp, bench_linear_delta_logp, bench_linear_logp, bench_logp
from .bench import Bench

BENCHES: dict[str, Bench] = {
    module.BENCH.op: module.BENCH
    for module in (bench_linear_logp, bench_linear_delta_logp, bench_logp, bench_delta_logp)
}
