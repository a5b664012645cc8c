"""Responses for the tests of pages: awkward ones, and many."""

import numpy as np
from dataset_files import token_rows

from dlogp_kernels.report.dataset import Replaced, ResponseRows

PROMPT = "<|user|>\nNina has 4 apples </script>.\nHow many?"
ENGLISH = [
    "Nina", " now", " has", " 6", ".", "\n", "\tso", "</script>", "<!--", "<b>", "\u2028", "\u202e", "ðŁĺ", "\x1b[0m",
]  # fmt: skip
HEBREW = ["שלום", " עולם", ",", " זה", " טקסט"]


def awkward_rows() -> list[ResponseRows]:
    """Two sources, markup, right-to-left text, pieces of characters, numbers that are none, replaced tokens."""
    delta_logp = np.linspace(-2, 2, len(ENGLISH))
    delta_logp[[3, 7, 8, 9]] = 0.125, np.nan, np.inf, -np.inf
    likely: dict = {"top_token": np.arange(14)[::-1], "base_top_token": np.full(14, 77_777), "logp": np.full(14, -0.25)}
    replaced = Replaced([1, 2], [50, 2], [" then", " has"])
    of_rl = {"prompt": PROMPT, "correct": 1.0, "finished": True, "replaced": replaced}
    of_base = {"prompt": PROMPT, "correct": 0.0, "finished": False}
    return [
        token_rows("rl", range(14), ENGLISH, line=1, response=of_rl, delta_logp=delta_logp, **likely),
        token_rows("base", range(4), ENGLISH[:4], line=2, response=of_base, delta_logp=[-3, 0, 0, 0]),
        token_rows("base", range(3), ENGLISH[:3], line=3, response=of_base | {"correct": 1.0}),
        token_rows("rl", range(20, 25), HEBREW, line=4, response={"prompt": "שאלה", "correct": 0.5}),
        token_rows("base", [30], [" one"], line=5, response={"prompt": "one"}),
        token_rows("base", [31], [""], line=6, response={"prompt": "undecodable"}),
    ]


def many_rows(num_tokens: int, mean_length: int = 500) -> list[ResponseRows]:
    """Responses of random words and numbers, with ends of lines, two to a prompt."""
    rng = np.random.default_rng(0)
    words = [" " + "".join(rng.choice(list("aehilnorst"), rng.integers(1, 9))) for _ in range(2000)] + ["\n"]
    rows: list[ResponseRows] = []
    while num_tokens:
        length = int(min(num_tokens, rng.integers(1, 2 * mean_length)))
        ids = np.where(rng.random(length) < 0.03, 2000, rng.integers(0, 2000, length))
        values = {name: rng.normal(size=length) for name in ("delta_logp", "logp", "base_logp", "entropy", "kl", "lse")}
        line = len(rows) + 1
        about = {"prompt": f"Question {len(rows) // 2}", "correct": float(rng.integers(2)), "finished": True}
        texts = [words[i] for i in ids]
        rows.append(token_rows(("rl", "base")[line % 2], ids, texts, line=line, response=about, **values))
        num_tokens -= length
    return rows
