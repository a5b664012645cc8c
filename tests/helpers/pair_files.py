"""A tiny pair of random models with its data on disk, for the tests of jobs and of the command line."""

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dlogp_kernels.hf.tiny import save_local, tiny_qwen3, word_tokenizer

WORDS = [f"w{index}" for index in range(60)]
CONTEXT = 64
VOCABULARY = len(WORDS) + 4
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}<bos> {{ m.content }} {% else %}"
    "{{ '<sep> ' + m.content + ' <eos> w0 ' }}{% endif %}{% endfor %}{% if add_generation_prompt %}<sep>{% endif %}"
)


class Pair(NamedTuple):
    """Directories of the models, and a data file of text."""

    rl: Path
    base: Path
    data: Path


def write_pair(directory: Path) -> Pair:
    """Save an RL model and a base of another width (so that nothing can be mixed up) and 40 responses."""
    tokenizer = word_tokenizer(WORDS)
    tokenizer.chat_template = CHAT_TEMPLATE
    for name, width, tied, seed in (("rl", 32, True, 1), ("base", 48, False, 2)):
        model = tiny_qwen3(
            len(tokenizer),
            hidden_size=width,
            num_layers=2,
            intermediate_size=64,
            num_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=tied,
            eos_token_id=tokenizer.eos_token_id,
            seed=seed,
        )
        # Random weights of the usual size give nearly uniform distributions, where many mistakes would not show.
        model.get_output_embeddings().weight.data *= 20
        save_local(model, tokenizer, directory / name)
    data = directory / "data.jsonl"
    write_lines(data, random_rows(40))
    return Pair(directory / "rl", directory / "base", data)


def random_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of text, of many lengths, from both sources."""
    rng = random.Random(seed)
    return [
        {
            "id": f"sample {index}",
            "source": rng.choice(["rl", "base"]),
            "prompt": " ".join(rng.choices(WORDS, k=rng.randint(1, 12))),
            "response": " ".join(rng.choices(WORDS, k=rng.randint(1, 30))),
        }
        for index in range(count)
    ]


def write_lines(path: Path, rows: Iterable[Mapping[str, Any] | bytes]) -> Path:
    """One line a row: JSON, or bytes as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def token_ids(text: str) -> list[int]:
    """What the pair's tokenizer makes of words."""
    return [WORDS.index(word) + 4 for word in text.split()]


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }
