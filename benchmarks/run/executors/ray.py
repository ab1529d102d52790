"""Executor on the machines of a Ray cluster."""

from __future__ import annotations

import logging
import os
import socket
from concurrent.futures import Future
from typing import Any

import torch

from adfq.errors import AdfqError, one_line
from benchmarks.run.executors.local import CORES, Failure, Job, LostWorkerError, run_in_process
from benchmarks.run.records import Record

#: Time for a cluster to answer, in seconds.
_PATIENCE = 10


class RayExecutor:
    """Executor that measures jobs on a cluster, each on CPUs of its own or on a GPU with its share of them.

    Every machine has this project installed, and data and checkpoints under the same paths. Machines need not share a
    disk, so that nothing is kept of an interrupted job.

    Args:
        device: device of a job, by type.
        cell_memory: memory of a job in GB; None for jobs that have a machine's CPUs for themselves.
        address: address of the cluster; None, the default, for the one that the environment names, or else one of this
            machine alone.

    Raises:
        AdfqError: if Ray is not installed, the cluster cannot be reached, or it has no such device.
    """

    def __init__(self, device: torch.device, cell_memory: float | None, address: str | None = None) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError:
            raise AdfqError("--executor ray needs Ray: pip install 'adfq[cluster]'") from None
        self.ray: Any = ray
        host, _, port = (address or "").rpartition(":")
        try:
            if host and port.isdigit() and "/" not in host:
                # Ray itself would try for minutes.
                socket.create_connection((host, int(port)), timeout=_PATIENCE).close()
        except OSError as error:
            raise AdfqError(f"cannot reach the Ray cluster {address}: {error.strerror or error}") from None
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise AdfqError(f"cannot reach the Ray cluster {address or ''}: {one_line(error)}") from None
        resources = ray.cluster_resources()
        if device.type == "cuda":
            self.slots = int(resources.get("GPU", 0))
            machines = [node["Resources"] for node in ray.nodes()]
            shares = [int(machine.get("CPU", 0) // machine["GPU"]) for machine in machines if machine.get("GPU")]
            options: dict[str, Any] = {"num_gpus": 1, "num_cpus": max(1, min(shares, default=1))}
        elif cell_memory is not None:
            self.slots, options = int(resources["CPU"]), {"num_cpus": 1, "memory": 1e9 * cell_memory}
        else:
            least = min(int(node["Resources"]["CPU"]) for node in ray.nodes() if "CPU" in node["Resources"])
            self.slots, options = int(resources["CPU"]) // least, {"num_cpus": least}
        if self.slots < 1:
            ray.shutdown()
            raise AdfqError(f"the Ray cluster has no {device.type}")
        self.device, self.cores = device.type, int(options["num_cpus"])
        self.measure: Any = self.ray.remote(max_retries=0, **options)(_run_with_cores)

    def submit(self, job: Job) -> Future[Record | Failure]:
        """Start a job on the cluster, see `Executor.submit`."""
        result: Future[Record | Failure] = Future()
        errors = self.ray.exceptions

        def hand_over(done: Any) -> None:
            error = done.exception()
            if isinstance(error, errors.RayTaskError):  # raised by the job itself
                result.set_exception(error.cause)
            elif isinstance(error, errors.OutOfMemoryError):
                result.set_exception(LostWorkerError("its process was killed for its memory", crowded=True))
            elif isinstance(error, errors.RayError):
                result.set_exception(LostWorkerError(f"its worker was lost: {one_line(error)}", crowded=False))
            elif error is not None:
                result.set_exception(error)
            else:
                result.set_result(done.result())

        job = Job(job.cell, job.known)
        self.measure.remote(job, self.device, self.cores).future().add_done_callback(hand_over)
        return result

    def close(self) -> None:
        """Leave the cluster, which ends its jobs."""
        self.ray.shutdown()


def _run_with_cores(job: Job, device: str, cores: int) -> Record | Failure:
    os.environ[CORES] = str(cores)
    return run_in_process(job, device)
