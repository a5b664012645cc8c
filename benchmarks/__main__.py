"""`python -m benchmarks`: command.py; `python -m benchmarks gpu`: a visit to a GPU, gpu/command.py."""

import sys


def main() -> None:
    if sys.argv[1:2] == ["gpu"]:
        # Its machines have not all that the other benchmarks import.
        from .gpu import command as on_gpu

        on_gpu.main(sys.argv[2:])
    else:
        from . import command

        command.main()


if __name__ == "__main__":
    main()
