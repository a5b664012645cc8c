"""The command line `dlogp …`: it parses, calls jobs and prints what they found."""

import importlib.util
import sys

from ..installation import how_to_install

#: What is imported of the packages of the extra `cli`.
_NEEDED = ("typer", "rich", "tqdm", "transformers", "safetensors", "pyarrow", "matplotlib", "psutil")


def main() -> None:
    """Run the command of `sys.argv`; the entry point of the script `dlogp`."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(
            f"error: {', '.join(missing)} can not be imported, expected the packages of the extra 'cli': "
            f"{how_to_install('cli')}"
        )
    from .app import run

    run()
