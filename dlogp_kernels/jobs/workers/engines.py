"""Which workers the options of a run ask for, and what gathers them."""

import contextlib
import importlib.util
import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from ...installation import how_to_install
from ..allowed import check_options
from ..errors import JobError
from ..options import Working
from .duty import Duty, Engine, Task
from .pool import Pool
from .processes import processes

_ALL = "all"
_DEVICE = re.compile(r"cpu|cuda(:\d+)?")
_ADDRESS = re.compile(r"auto|[^/\s]+:\d+")


def check_working(working: Working, device: str | None) -> str | None:
    """What --device and --devices together say of `device`, None for the default; JobError for what does not fit."""
    check_options(working)
    devices, is_ray = working.devices, working.engine == "ray"
    if working.address is not None and not is_ray:
        raise JobError(f"--address is {working.address!r} without --engine ray, expected both")
    if working.address is not None and not _ADDRESS.fullmatch(working.address):
        raise JobError(f"--address is {working.address!r}, expected auto or the host:port of a head node of Ray")
    if is_ray and importlib.util.find_spec("ray") is None:
        raise JobError(
            f"--engine is 'ray', which can not be imported, expected the extra 'ray': {how_to_install('ray')}"
        )
    if (devices is None and not is_ray) or device is None or ":" not in device:
        return _device_of(working, device)
    raise JobError(f"--device is {device!r}, one alone: expected cpu or cuda beside --devices and --engine ray")


def _device_of(working: Working, device: str | None) -> str | None:
    """The kind of the devices that --devices lists, or --device where it does not."""
    names = _listed(working.devices)
    if not names:
        return device
    for name in names:
        if not _DEVICE.fullmatch(name):
            raise JobError(f"--devices has {name!r}, expected all, a number, or a list such as cuda:0,cuda:1")
    if working.engine == "ray":
        raise JobError(f"--devices is {working.devices!r}, but Ray chooses the devices: expected all or a number")
    kinds = {name.partition(":")[0] for name in names}
    if len(kinds) > 1:
        raise JobError(f"--devices is {working.devices!r}, expected devices of one kind")
    if device is not None and {device} != kinds:
        raise JobError(f"--devices is {working.devices!r} beside --device {device}, expected devices of that kind")
    return kinds.pop()


def _listed(devices: str | None) -> list[str]:
    """The names of a list; none where a number of devices or all are asked for."""
    return [] if devices is None or devices == _ALL or devices.isdecimal() else devices.split(",")


def engine_of(working: Working, device: str, given: str | None) -> AbstractContextManager[Engine]:
    """What gathers the teams of a run on a device, perhaps given by name; Ray is there within its context.

    JobError for devices that are not there.
    """
    if working.engine == "ray":
        from .ray_actors import ray_engine

        number = None if working.devices in (None, _ALL) else _number(working.devices)
        return ray_engine(working.address, number, device, may_leave_gpus=given is not None)
    if working.devices is None:
        return contextlib.nullcontext(_Alone)
    devices = local_devices(working.devices, device)
    # This process computes nothing meanwhile.
    threads = max(1, torch.get_num_threads() // len(devices))

    def gather(duty: Duty, here: Any) -> Pool:
        return processes(devices, threads, duty)

    return contextlib.nullcontext(gather)


def local_devices(devices: str, device: str) -> list[str]:
    """The devices of --devices, of the kind of `device`; JobError if there is none such, or a GPU is named twice."""
    names = _listed(devices)
    if device == "cpu":
        return names or ["cpu"] * (1 if devices == _ALL else _number(devices))
    there = torch.cuda.device_count()
    numbers = [int(name.partition(":")[2] or 0) for name in names]
    if not names:
        numbers = list(range(there if devices == _ALL else _number(devices)))
    if max(numbers) >= there:
        raise JobError(f"--devices is {devices!r}, but there is no cuda:{max(numbers)}: this machine has {there} GPUs")
    if len(set(numbers)) < len(numbers):
        raise JobError(f"--devices is {devices!r}, which names a GPU twice: expected each once")
    return [f"cuda:{number}" for number in numbers]


def _number(devices: Any) -> int:
    if not 1 <= int(devices) < 2**10:
        raise JobError(f"--devices is {devices}, expected all, a number in [1, 2**10), or a list such as cuda:0,cuda:1")
    return int(devices)


class _Alone:
    """This process as the only worker."""

    def __init__(self, duty: Duty, here: Any) -> None:
        self._computing = duty.load(here)

    def __enter__(self) -> "_Alone":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def greeting(self) -> Any:
        """See `Computing`."""
        return self._computing.greeting

    def results(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Any]]:
        """Each task, in order, with what it gives."""
        for task in tasks:
            yield task, self._computing(task.payload)
