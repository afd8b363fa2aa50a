"""Several processes that train one model: joined, averaged, and ended together with one line.

`torchrun` (or Slurm, or anything that sets RANK, WORLD_SIZE and MASTER_ADDR) starts them. Each computes the
loss of its share of a step's samples; norms and divisors are those of all samples (`models/processes.py`), so
that the averaged gradient is that of a single process.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from ..errors import DistillBevError, RunError

GRACE_S = 3.0  # for the process that tells why the run ends, before the others' ends are noticed
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


def join_processes() -> tuple[int, int, torch.device]:
    """(rank, number of processes, device) of this process; joins the others that `torchrun` started."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    return (dist.get_rank(), world_size, device) if world_size > 1 else (0, 1, device)


def wait_for_all() -> None:
    """Returns when every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def average_gradients(module: nn.Module, values: dict[str, float]) -> dict[str, float]:
    """Averages the gradients over the processes in place, and gives the averages of `values`.

    A parameter that no process used keeps no gradient, as in a single process.
    """
    if not dist.is_initialized():
        return values
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    numbers = [*(float(p.grad is not None) for p in parameters), *values.values()]
    flat = torch.cat(
        [
            *((torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in parameters),
            torch.tensor(numbers, device=parameters[0].device),
        ]
    )
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    *gradients, numbers = flat.split([*(p.numel() for p in parameters), len(numbers)])
    used, averages = numbers[: len(parameters)].tolist(), numbers[len(parameters) :].tolist()
    for parameter, gradient, share in zip(parameters, gradients, used, strict=True):
        parameter.grad = gradient.view_as(parameter).to(parameter.dtype) if share > 0 else None
    return dict(zip(values, averages, strict=True))


def gather_tokens(tokens: list[str]) -> list[str]:
    """The samples of all processes; to be called by all of them."""
    if not dist.is_initialized():
        return tokens
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, tokens)
    return [token for of_process in gathered for token in of_process]


def seed_step(seed: int, step: int, part: int, rank: int) -> None:
    """Makes what is drawn in a part of a step (dropout) a function of these numbers alone."""
    torch.manual_seed(int(np.random.default_rng([seed, step, part, rank]).integers(2**63)))


@dataclass
class Ending:
    """`kept` says, at the end of the line that tells why a run ends, what is left of it."""

    kept: Callable[[], str] = str


@contextmanager
def ending_together(name: str) -> Iterator[Ending]:
    """Whatever ends one process ends all of them, and one process tells why, in one line.

    Args:
        name: of the run.

    Raises:
        DistillBevError: what was raised inside, or that another process was lost.
        SystemExit: another process tells the reason.
    """
    ending = Ending()
    try:
        with _stopping_when_told():
            yield ending
    except (DistillBevError, RuntimeError, _Stopped) as error:
        told = _explain(error, name)
        if told is None:
            raise
        if not _first_to_tell():
            time.sleep(GRACE_S)
            raise SystemExit(1) from None
        raise type(told)(f"{told}{ending.kept()}") from None


def _explain(error: BaseException, name: str) -> DistillBevError | None:
    """The error to tell the user; None for a fault of the program, whose traceback is wanted."""
    if isinstance(error, DistillBevError):
        return error
    lost = isinstance(error, dist.DistError) or any(sign in str(error) for sign in LOST)
    if isinstance(error, _Stopped) or lost:
        return RunError(f"{name}: another process of this run was killed or lost, so all of them stopped")
    return None


def _first_to_tell() -> bool:
    """Whether no other process has told why the run ends; asks the store that outlives a killed process."""
    if not dist.is_initialized():
        return True
    try:
        return dist.distributed_c10d._get_default_store().add("distillbev/told", 1) == 1
    except RuntimeError:  # the store went with its process
        return True


class _Stopped(BaseException):
    """`torchrun` ends the processes that are left when one was lost."""


@contextmanager
def _stopping_when_told() -> Iterator[None]:
    """Turns the first SIGTERM into an exception, so that the process can say what happened.

    A process that hangs in a collective of a GPU never comes back to Python; a thread ends it after a while.
    """
    if not dist.is_initialized() or threading.current_thread() is not threading.main_thread():
        yield
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    ended = threading.Event()

    def stop(_signal: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _Stopped

    def watch() -> None:
        while (signals := os.read(read, 64)) and signal.SIGTERM not in signals:
            pass  # other signals come here too; nothing more comes when the run has ended
        os.close(read)
        if signals and not ended.wait(2 * GRACE_S):
            if _first_to_tell():
                print("error: another process of this run was killed or lost", file=sys.stderr, flush=True)
            os._exit(1)

    before, wakeup = signal.signal(signal.SIGTERM, stop), signal.set_wakeup_fd(write)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    except BaseException:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what is under way shall be told
        raise
    else:
        signal.signal(signal.SIGTERM, before)
    finally:
        ended.set()
        signal.set_wakeup_fd(wakeup)
        os.close(write)
