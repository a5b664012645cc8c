"""What the forward of a model calls its cache: `transformers` 5.24 renamed it, and state-space models had their own."""

from collections.abc import Collection

CACHE_NAMES = ("cache", "past_key_values", "cache_params")


def cache_name(accepted: Collection[str]) -> str:
    """The name among the parameters of a forward; the output has the cache under the same one."""
    return next((name for name in CACHE_NAMES if name in accepted), "past_key_values")
