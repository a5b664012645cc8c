"""Which processes have which responses: those of a tensor-parallel group have the same ones, and are as one."""

from dataclasses import dataclass

from accelerate import Accelerator
from torch import Tensor


@dataclass(frozen=True)
class Sharing:
    """Of the accelerator's processes, `copies` at a time, a tensor-parallel group, have the same responses."""

    accelerator: Accelerator
    copies: int

    @property
    def groups(self) -> int:
        """How many there are, with responses of their own."""
        return self.accelerator.num_processes // self.copies

    @property
    def index(self) -> int:
        """That of this process's group."""
        return self.accelerator.process_index // self.copies

    def own_rows(self, count: int) -> slice:
        """Those of this process among `count` rows of all."""
        local = count // self.groups
        return slice(self.index * local, (self.index + 1) * local)

    def once(self, gathered: Tensor) -> Tensor:
        """Of rows that were gathered from all processes each response's once."""
        return gathered.unflatten(0, (self.groups, self.copies, -1))[:, 0].flatten(0, 1)
