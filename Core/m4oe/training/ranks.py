"""The processes of one training: alone, or several started by torchrun that share every batch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_TIMEOUT = timedelta(hours=2)  # a validation on one process may keep the others waiting


@dataclass(frozen=True)
class Ranks:
    """This process among those of the training.

    Attributes:
        rank: Number of this process; 0 writes the files.
        world: Number of processes.
    """

    rank: int = 0
    world: int = 1

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum over all processes; its gradient is this process's own part of the sum's."""
        if self.world == 1:
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return tensor + (total - tensor.detach())

    def share_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Adds up the gradients of all processes, as each has those of its own images alone."""
        if self.world == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        together = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(together)
        for gradient, part in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def gather(self, mine: list[Any]) -> list[Any]:
        """The lists of all processes, one after the other."""
        if self.world == 1:
            return mine
        parts: list[Any] = [None] * self.world
        dist.all_gather_object(parts, mine)
        return [item for part in parts for item in part]

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process goes through before the others do, who find what it has made."""
        if self.rank > 0:
            self.wait()
        yield
        if self.rank == 0:
            self.wait()

    def wait(self) -> None:
        """Waits until all processes are here."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Joins the processes that torchrun started, or is alone.

    Raises:
        RuntimeError: Another process has stopped.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        yield Ranks()
        return
    cuda = torch.cuda.is_available()
    if cuda:  # else what is gathered of all processes would lie on the first GPU
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=_TIMEOUT)
    try:
        yield Ranks(dist.get_rank(), world)
    except dist.DistError as error:
        raise _stopped() from error
    except RuntimeError as error:
        if "onnection" in str(error) or "gloo" in str(error).lower():
            raise _stopped() from error
        raise
    finally:
        dist.destroy_process_group()


def local_device() -> str:
    """The name of the device of this process: each of a machine's processes has a GPU of its own."""
    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if rank is not None and torch.cuda.is_available() else "auto"


def _stopped() -> RuntimeError:
    return RuntimeError(
        "another process of this training has stopped; start the same command again, it goes on at the last checkpoint"
    )
