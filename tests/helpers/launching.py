"""`accelerate launch` of two processes on the CPU."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch.distributed as distributed
from paths import ROOT


def end_group() -> None:
    """Before a process ends: one whose threads still talk is aborted now and then."""
    distributed.barrier()
    distributed.destroy_process_group()


def launched(script: str, arguments: list[object], *options: str, **environment: str) -> subprocess.CompletedProcess:
    """What a script of tests/helpers has said in the end; `environment` is added to this process's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    helpers = Path(__file__).parent
    command = [
        sys.executable, "-m", "accelerate.commands.launch", *options, "--main_process_port", str(port),
        str(helpers / script), *map(str, arguments),
    ]  # fmt: skip
    paths = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(helpers))), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, env=os.environ | paths | environment, capture_output=True, text=True, timeout=300, check=False
    )
