"""Several processes, started by `torchrun`: who is who, what they share out, and how weights are spread over them.

torch's own means: DDP keeps all weights in each process, FSDP2 (`fully_shard`) a part of each in each.
"""

import os
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from refiners.weights.devices import check_is_available


@dataclass(frozen=True)
class Process:
    """This process among those that train together; alone by default."""

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes files and shows progress."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """The mean of a tensor over the processes."""
        if self.count == 1:
            return values
        total = values.detach().clone()
        dist.all_reduce(total)
        return total / self.count

    def largest(self, number: int) -> int:
        """The largest of a number over the processes."""
        if self.count == 1:
            return number
        found = torch.tensor(number, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found.item())

    def gather(self, value: Any) -> list[Any]:
        """A value of each process, by rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Go on when all have come here."""
        if self.count > 1:
            dist.barrier()


@contextmanager
def joined(device: str = "auto") -> Generator[Process]:
    """Join the processes that `torchrun` started, if it did.

    device: "auto" is the GPU of this process if there is one, else the CPU.
    Raises ValueError if the device is not there, ConnectionError if another process has ended before its time.
    """
    count = int(os.environ.get("WORLD_SIZE", 1))
    place = _choose_device(device, int(os.environ.get("LOCAL_RANK", 0)), count)
    if count == 1:
        yield Process(device=place)
        return
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield Process(dist.get_rank(), count, place)
        dist.barrier()
    except RuntimeError as error:
        if "gloo/transport" not in str(error):  # it has no error of its own
            raise
        raise ConnectionError(
            f"process {dist.get_rank()} of {count} has lost another one, which may have said why; the same command "
            "goes on from the last checkpoint"
        ) from error
    finally:
        dist.destroy_process_group()


def shard(model: nn.Module, blocks: Iterable[nn.Module], process: Process) -> None:
    """Spread the weights of a model over the processes; those of each block come together when it runs."""
    mesh = dist.device_mesh.init_device_mesh(process.device.type, (process.count,))
    for block in [*blocks, model]:
        fully_shard(block, mesh=mesh)


def shard_outermost(module: nn.Module, process: Process) -> None:
    """Make a module the one that FSDP begins with, around models that `shard` spread; no other weight is spread.

    Inside of its forward pass any of their blocks may then be called first, and afterwards any of them by itself.
    """
    mesh = dist.device_mesh.init_device_mesh(process.device.type, (process.count,))
    fully_shard(module, mesh=mesh, ignored_params=set(module.parameters()))


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of which each process has a part; all must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_as(tensor: Tensor, reference: Tensor) -> Tensor:
    """A full tensor, spread over the processes as `reference` is."""
    if not isinstance(reference, DTensor):
        return tensor.to(reference.device)
    mesh = reference.device_mesh
    return distribute_tensor(tensor.to(mesh.device_type), mesh, reference.placements)


def copy_whole(target: Tensor, source: Tensor) -> None:
    """Copy a full tensor into one that may be spread."""
    with torch.no_grad():
        target.copy_(spread_as(source, target))


def _choose_device(wanted: str, local_rank: int, count: int) -> torch.device:
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ValueError(f'device = {wanted!r} is none; write "auto", "cpu", "cuda" or "cuda:1"') from error
    if device.type != "cuda":
        if device.type == "meta":
            raise ValueError('device = "meta" holds no weights; write "auto", "cpu", "cuda" or "cuda:1"')
        try:
            check_is_available(device)
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        return device
    has_index = ":" in wanted
    if has_index and count > 1:
        raise ValueError(f'device = {wanted!r} puts all {count} processes on one GPU; write "cuda"')
    index = device.index if has_index else local_rank
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"device = {wanted!r} means GPU {index}, but this machine has {torch.cuda.device_count()}; start fewer "
            "processes or choose another device"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
