"""What C++ keeps a list of besides Python, read out of the headers: it is the same, in the same order."""

import re

import pytest
import torch
from paths import ROOT

from dlogp_kernels.inputs import flat_transform
from dlogp_kernels.results import DeltaLogpStats, LogpStats, PolicyMetrics

_COMMON = ROOT / "csrc" / "common"


def _table(header: str, name: str) -> list[tuple[str, str]]:
    """The kind and the name of each entry of a macro's list."""
    source = (_COMMON / header).read_text(encoding="utf-8")
    (lines,) = re.findall(rf"#define {name}\([\w, ]+\) *\\\n((?:.*\\\n)*.*)", source)
    return re.findall(r"^ *(\w+)\((\w+)", lines, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "results", "op"),
    [("DLOGP_LOGP_STATS", LogpStats, "logp"), ("DLOGP_DELTA_LOGP_STATS", DeltaLogpStats, "delta_logp")],
)
def test_statistics(name, results, op):
    """Outputs by themselves, and the rows of `extra`: normalizers and what is on demand."""
    table = _table("statistics.h", name)
    extra = [field for kind, field in table if kind in ("EXTRA", "ON_DEMAND")]
    fields = [field for _, field in table if field not in extra]
    assert [*fields, *(field for kind, field in table if kind == "ON_DEMAND")] == [*results._fields]
    for schema in (f"{op}_fwd", f"linear_{op}_fwd"):
        returned = getattr(torch.ops.dlogp, schema).default._schema.returns
        assert [x.name for x in returned] == [*fields, "extra"]
    logits, transform, models = torch.zeros(4, 5), flat_transform(1.0, None, 1.0), 1 + (op == "delta_logp")
    target = torch.zeros(4, 3, dtype=torch.int64)
    outputs = getattr(torch.ops.dlogp, f"{op}_fwd")(*[logits, transform] * models, target, -100, True)
    shapes = {"PER_TARGET": (4, 3), "PER_ROW": (4,)}
    expected = [shapes[kind] for kind, _ in table if kind in shapes]
    assert [tuple(x.shape) for x in outputs] == [*expected, (len(extra), 4)]
    assert extra == ["max", "rest", *["base_max", "base_rest"] * (models - 1), *results._field_defaults]


def test_policy_metrics():
    assert tuple(field for _, field in _table("policy.h", "DLOGP_POLICY_METRICS")) == PolicyMetrics._fields
