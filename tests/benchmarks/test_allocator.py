"""Memory that is kept for the next tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys, torch
from pathlib import Path
from benchmarks.allocator import keep_freed_memory

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024

if sys.argv[1] == "kept":
    keep_freed_memory()
tensor = torch.ones(16 * 2**20)
with_tensor = resident()
del tensor
print(with_tensor - resident())
"""


def freed(mode: str) -> float:
    """MiB that the system gets back of a tensor of 64."""
    run = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True)
    return float(run.stdout)


def has_glibc() -> bool:
    return "CS_GNU_LIBC_VERSION" in getattr(os, "confstr_names", {}) and Path("/proc/self/status").exists()


@pytest.mark.skipif(not has_glibc(), reason="the C library is not glibc")
def test_the_memory_of_freed_tensors_stays_with_the_process() -> None:
    assert freed("given back") > 60
    assert freed("kept") < 4
