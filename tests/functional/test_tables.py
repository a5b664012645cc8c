"""What C++ keeps a list of besides Python, read out of the headers: it is the same, in the same order."""

import re

import pytest
import torch
from paths import ROOT

import dlogp_kernels
from dlogp_kernels.results import DeltaLogpStats, LogpStats, PolicyMetrics

_COMMON = ROOT / "csrc" / "common"


def _table(header: str, name: str) -> list[tuple[str, str]]:
    """The kind and the name of each entry of a macro's list."""
    source = (_COMMON / header).read_text(encoding="utf-8")
    (lines,) = re.findall(rf"#define {name}\(\w+, \w+\) *\\\n((?:.*\\\n)*.*)", source)
    return re.findall(r"^ *(\w+)\((\w+)", lines, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "results", "op"),
    [("DLOGP_LOGP_STATS", LogpStats, "logp"), ("DLOGP_DELTA_LOGP_STATS", DeltaLogpStats, "delta_logp")],
)
def test_statistics(name, results, op):
    table = _table("statistics.h", name)
    assert tuple(field for _, field in table) == results._fields
    for schema in (f"{op}_fwd", f"linear_{op}_fwd"):
        returned = getattr(torch.ops.dlogp, schema).default._schema.returns
        assert tuple(x.name for x in returned) == results._fields
    logits = torch.zeros(2, 4)
    stats = getattr(dlogp_kernels, op)(*[logits] * (1 + (op == "delta_logp")), torch.zeros(2, 3, dtype=torch.int64))
    shapes = {"PER_TARGET": (2, 3), "PER_ROW": (2,)}
    assert [shapes[kind] for kind, _ in table] == [tuple(x.shape) for x in stats]


def test_policy_metrics():
    assert tuple(field for _, field in _table("policy.h", "DLOGP_POLICY_METRICS")) == PolicyMetrics._fields
