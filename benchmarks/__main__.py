"""`python -m benchmarks`: command.py; `python -m benchmarks gpu`: a visit to a GPU, gpu/command.py."""

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else [*arguments]
    if given[:1] == ["gpu"]:
        # Its machines have not all that the other benchmarks import.
        from .gpu import command as on_gpu

        on_gpu.main(given[1:])
    else:
        from . import command

        command.main(given)


if __name__ == "__main__":
    main()
