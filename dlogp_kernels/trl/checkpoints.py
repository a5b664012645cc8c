"""What a checkpoint holds beside that of TRL: the responses that are still to be learned from."""

from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..report.files import replaced_atomically


def complete_checkpoints(directory: str | Path) -> dict[int, Path]:
    """The checkpoints in a trainer's output directory that were written to their end, by step."""
    paths = (path.parent for path in Path(directory).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{_file_name(0)}"))
    return {int(path.name.rpartition("-")[2]): path for path in paths}


def write_rollouts(output_dir: str | Path, step: int, process_index: int, state: dict[str, Any]) -> None:
    """Write what this process has still to learn from, into the checkpoint of a step.

    The last file of a checkpoint: where it is, the checkpoint is complete.
    """
    path = Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}" / _file_name(process_index)
    with replaced_atomically(path) as temporary:
        torch.save(state, temporary)


def read_rollouts(checkpoint: str | Path, process_index: int, device: torch.device) -> dict[str, Any] | None:
    """What `write_rollouts` wrote; None in a checkpoint of TRL's own trainer."""
    path = Path(checkpoint) / _file_name(process_index)
    return torch.load(path, map_location=device, weights_only=True) if path.exists() else None


def _file_name(process_index: int) -> str:
    return f"rollouts_{process_index}.pt"
