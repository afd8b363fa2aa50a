"""Spoils a tiny simulated world, one thing at a time, and watches how it is read.

    .venv/bin/python tools/fuzz                     # 2,000 cases of seed 0, a table of what became of them
    .venv/bin/python tools/fuzz --seed 3 --only 17  # one case again, told in full

Every case must end in one line of ours (an error), or in samples that are equal to those of the sound world or to
what a plain reading of the spoilt files gives (a changed value is a changed value). Anything else is a fault: an
exception of someone else, a sample that is wrong without a word, more than the time or the memory allowed, an
index that reads otherwise than its tables, or an error that `prepare --check` does not find. Exit code 1 on a fault.
"""

from __future__ import annotations

import argparse
import collections
import multiprocessing
import os
import sys
import time

from judge import GOOD, Outcome, try_cases
from spoil import SPOILERS


def table_of(outcomes: list[Outcome]) -> list[str]:
    """Counts by kind and outcome, as Markdown."""
    columns = [*GOOD, *sorted({o.outcome for o in outcomes} - set(GOOD))]
    counts = collections.Counter((o.kind, o.outcome) for o in outcomes)
    lines = ["| spoilt | cases | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for kind in [*dict.fromkeys(spoil.__name__.removeprefix("spoil_") for spoil, _ in SPOILERS), None]:
        cells = [
            sum(n for (k, o), n in counts.items() if kind in (None, k) and o == column) for column in columns
        ]
        lines.append(f"| {kind or 'all'} | {sum(cells)} | " + " | ".join(map(str, cells)) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--only", type=int, help="number of the one case to run")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    start = time.perf_counter()
    if arguments.only is not None:
        outcomes = try_cases(arguments.seed, [arguments.only], tell_all=True)
    else:
        numbers = list(range(arguments.count))
        shares = [
            (arguments.seed, numbers[i :: arguments.processes], False) for i in range(arguments.processes)
        ]
        with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
            outcomes = [outcome for share in pool.starmap(try_cases, shares) for outcome in share]
        print("\n".join(table_of(outcomes)))
    faults = sum(outcome.outcome not in GOOD for outcome in outcomes)
    print(
        f"\n{len(outcomes)} cases of seed {arguments.seed}, {faults} faults, {time.perf_counter() - start:.0f} s"
    )
    sys.exit(faults > 0)


if __name__ == "__main__":
    main()
