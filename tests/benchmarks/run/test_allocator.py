"""Memory that is kept for the next tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys, torch
from contextlib import nullcontext
from pathlib import Path
from benchmarks.run.allocator import freed_memory_given_back, keep_freed_memory

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024

def freed():
    tensor = torch.ones(16 * 2**20)
    with_tensor = resident()
    del tensor
    return with_tensor - resident()

if sys.argv[1] != "as it comes":
    keep_freed_memory()
with freed_memory_given_back() if sys.argv[1] == "given back" else nullcontext():
    print(freed())
print(freed())
"""


def freed(mode: str) -> tuple[float, ...]:
    """MiB that the system gets back of a tensor of 64, and of another one."""
    run = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True)
    return tuple(map(float, run.stdout.split()))


def has_glibc() -> bool:
    return "CS_GNU_LIBC_VERSION" in getattr(os, "confstr_names", {}) and Path("/proc/self/status").exists()


pytestmark = pytest.mark.skipif(not has_glibc(), reason="the C library is not glibc")


def test_the_memory_of_freed_tensors_stays_with_the_process() -> None:
    assert min(freed("as it comes")) > 60
    assert max(freed("kept")) < 4


def test_it_is_given_back_for_a_while() -> None:
    meanwhile, afterwards = freed("given back")
    assert meanwhile > 60
    assert afterwards < 4
