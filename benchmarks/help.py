"""Seconds until `distillbev --help` has answered, and what importing costs the most.

Run: python benchmarks/help.py
"""

import statistics
import subprocess
import sys
import time

LIMIT_S = 0.3
HELP = ("-m", "distillbev", "--help")


def seconds_to_answer(repeats: int = 15) -> list[float]:
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        subprocess.run([sys.executable, *HELP], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return times[1:]  # the first one may compile


def costly_imports(count: int = 8) -> list[tuple[float, str]]:
    """(ms, module), each with all that it imports itself."""
    done = subprocess.run([sys.executable, "-X", "importtime", *HELP], capture_output=True, text=True)
    rows = [line.split("|") for line in done.stderr.splitlines() if line.startswith("import time:")]
    found = [(int(row[1]) / 1000, row[2].rstrip()) for row in rows[1:]]
    outermost = [(ms, name.strip()) for ms, name in found if len(name) - len(name.lstrip()) <= 3]
    return sorted(outermost, reverse=True)[:count]


if __name__ == "__main__":
    times = seconds_to_answer()
    print(
        f"distillbev --help: median {statistics.median(times):.3f} s, fastest {min(times):.3f} s "
        f"of {len(times)} (at most {LIMIT_S} s wanted)"
    )
    for ms, module in costly_imports():
        print(f"{ms:7.1f} ms  {module}")
