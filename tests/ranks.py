"""Processes that train together, forked from the test: they need not import torch again."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from distillbev.cli import main

FORK = multiprocessing.get_context("fork")


def start_ranks(
    arguments: Sequence[str],
    world_size: int,
    logs: Path,
    prepare: Callable[[int], None] = lambda rank: None,
) -> list[BaseProcess]:
    """Starts `distillbev ARGUMENTS` in so many processes, as torchrun does; output goes to `logs/RANK.txt`.

    `prepare` is called in each process, with its rank.
    """
    logs.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ranks = [
        FORK.Process(target=_command, args=(list(arguments), rank, world_size, port, logs, prepare))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    return ranks


def run_ranks(arguments: Sequence[str], world_size: int, logs: Path) -> list[str]:
    """What every process printed; all have to succeed."""
    output, exit_codes = end_of(start_ranks(arguments, world_size, logs), logs)
    assert exit_codes == [0] * world_size, output
    return output


def end_of(ranks: list[BaseProcess], logs: Path) -> tuple[list[str], list[int | None]]:
    """What every process printed, and its exit code."""
    for process in ranks:
        process.join(timeout=300)
    return [path.read_text() for path in sorted(logs.iterdir())], [process.exitcode for process in ranks]


def _command(
    arguments: list[str], rank: int, world_size: int, port: int, logs: Path, prepare: Callable[[int], None]
) -> None:
    with (logs / f"{rank}.txt").open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # pytest holds the old ones
    torch.set_num_threads(1)  # a fork must not use the parent's threads
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    sys.argv = ["distillbev", *arguments]
    try:
        prepare(rank)
        main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
