"""Run fio against a server and read what it measured."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.bench.servers import Command, show


@dataclass(frozen=True, slots=True)
class Job:
    """What one client does."""

    rw: str
    block_size: str
    queue_depth: int
    fsync: int = 0
    """A flush after so many writes; 0 for none."""
    extra: tuple[str, ...] = ()

    def options(self) -> Command:
        """As options of fio."""
        fsync = (f"--fsync={self.fsync}",) if self.fsync else ()
        return (f"--rw={self.rw}", f"--bs={self.block_size}", f"--iodepth={self.queue_depth}", *fsync, *self.extra)


@dataclass(frozen=True, slots=True)
class Result:
    """What fio measured."""

    iops: float
    bytes_per_s: float
    p99_s: float
    p999_s: float
    slowest_s: float
    slowest_half_second_iops: float
    total_bytes: int
    median_flush_s: float


def command(uri: str, job: Job, *, size: int, seconds: float | None, seed: int = 1) -> Command:
    """The command line; without `seconds` the whole size is done once. Buffers are 60 % compressible."""
    timed = ("--time_based", f"--runtime={seconds}") if seconds else ()
    return (
        "fio", "--name=job", "--ioengine=nbd", f"--uri={uri}", f"--size={size}", *job.options(), *timed,
        f"--randseed={seed}", "--buffer_compress_percentage=60", "--refill_buffers",
    )  # fmt: skip


class Client:
    """A running fio."""

    def __init__(self, directory: Path, line: Command) -> None:
        self._line = line
        self._process = subprocess.Popen(
            (*line, "--output-format=json"),
            cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def result(self) -> Result:
        """Wait for its end. Ends the program when fio or a request failed."""
        output, errors = self._process.communicate()
        job = json.loads(output[output.index("{") :])["jobs"][0] if "{" in output else {"error": 1}
        if self._process.returncode or job["error"]:
            sys.exit(f"{show(self._line)} failed: {errors or output}")
        return _parse(job)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.communicate()


def run(directory: Path, line: Command) -> Result:
    """Run fio to its end."""
    return Client(directory, line).result()


def fill(directory: Path, uri: str, size: int) -> None:
    """Write the whole disk once, and flush."""
    run(directory, command(uri, Job("write", "1M", 8, extra=("--end_fsync=1",)), size=size, seconds=None))


def _parse(job: dict[str, Any]) -> Result:
    side = max(job["read"], job["write"], key=lambda side: side["total_ios"])
    latency = side["clat_ns"]
    percentiles = latency.get("percentile", {})
    return Result(
        iops=side["iops"],
        bytes_per_s=side["bw_bytes"],
        p99_s=percentiles.get("99.000000", 0) / 1e9,
        p999_s=percentiles.get("99.900000", 0) / 1e9,
        slowest_s=latency["max"] / 1e9,
        slowest_half_second_iops=side["iops_min"],
        total_bytes=side["io_bytes"],
        median_flush_s=job["sync"]["lat_ns"].get("percentile", {}).get("50.000000", 0) / 1e9,
    )
