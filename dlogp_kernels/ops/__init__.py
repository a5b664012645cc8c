"""The ops `torch.ops.dlogp.*`: schema, fake, autograd and the choice of a backend."""

from . import backends, schemas
from .library import LIBRARY

for _op in schemas.SCHEMAS:
    LIBRARY.define(schemas.public_schema(_op))
    for _backend in backends.COMPILED:
        if backends.is_private(_backend, _op):
            LIBRARY.define(schemas.backend_schema(_backend, _op))
for _op in schemas.OVER_RANKS:
    LIBRARY.define(schemas.public_schema(_op))
for _schema in schemas.LINEAR_KERNELS:
    LIBRARY.define(_schema)

backends.load_extensions()

from . import (  # noqa: E402
    extrapolated_sample,
    linear_extrapolated_sample,
    linear_policy_loss,
    policy_loss,
    sharded,
    sharded_sampling,
    statistics,
)

__all__ = [
    "backends",
    "extrapolated_sample",
    "linear_extrapolated_sample",
    "linear_policy_loss",
    "policy_loss",
    "schemas",
    "sharded",
    "sharded_sampling",
    "statistics",
]
