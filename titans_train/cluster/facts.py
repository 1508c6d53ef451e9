"""What one rank finds on its node: device, memory, versions, disk, data. Measured here, judged in findings.py."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import socket
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from titans_train.plan import Plan

PACKAGES = ("torch", "deepspeed", "megatron-core", "mosaicml-streaming", "numpy", "safetensors", "transformers")
WRITTEN = 32 << 20  # bytes, to measure the disk
SIZE = 512  # of the matrices that are multiplied
DRIVER = Path("/proc/driver/nvidia/version")
SEEN_SECONDS = 10.0  # network file systems show another node's file within their attributes' time


@dataclass(frozen=True)
class Device:
    kind: str  # "cuda" or "cpu"
    name: str
    count: int  # that this rank sees; CPUs: that this process may use
    memory: int  # bytes; CPU: free on the node
    right: bool  # is a product of matrices what it must be?
    error: str = ""


@dataclass(frozen=True)
class Disk:
    """Of the run folder, or of the nearest folder above it that exists."""

    place: str
    free: int = 0  # bytes
    speed: float = 0.0  # bytes per second, written and flushed
    error: str = ""


@dataclass(frozen=True)
class Facts:
    """Of one rank. `disk` and `data` (what its data's fingerprint is, or why they cannot be read): a node's first's."""

    rank: int
    local_rank: int
    local_ranks: int
    host: str
    versions: dict[str, str]
    config: str  # digest of the plan
    device: Device
    disk: Disk | None = None
    data: str = ""
    data_error: str = ""
    ready: str = ""  # a remark on what computes the model here
    ready_error: str = ""  # why it cannot be computed

    @classmethod
    def from_json(cls, text: str) -> Facts:
        values: dict[str, Any] = json.loads(text)
        disk = values["disk"]
        return cls(**{**values, "device": Device(**values["device"]), "disk": None if disk is None else Disk(**disk)})


def gather_facts(plan: Plan, rank: int, local_rank: int) -> Facts:
    first = local_rank == 0
    data, data_error = read_data(plan) if first else ("", "")
    ready, ready_error = look_at_kernels(plan)
    return Facts(
        rank=rank, local_rank=local_rank, local_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        host=socket.gethostname(), versions=versions(), device=look_at_device(local_rank),
        config=hashlib.sha256(json.dumps(plan.to_dict(), sort_keys=True).encode()).hexdigest()[:12],
        disk=look_at_disk(place_of(plan)) if first else None, data=data, data_error=data_error,
        ready=ready, ready_error=ready_error,
    )  # fmt: skip


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    import torch

    if torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        with suppress(OSError, IndexError):
            found["driver"] = DRIVER.read_text().splitlines()[0].strip()
    return found


def look_at_device(local_rank: int) -> Device:
    """The rank's own. Sums of products of small integers are exact in float32 (and TF32): every digit is compared."""
    import torch

    numbers = torch.arange(SIZE * SIZE).reshape(SIZE, SIZE)
    a, b = numbers % 7 - 3, numbers % 5 - 2
    if not torch.cuda.is_available():
        right = bool(((a.float() @ b.float()).long() == a @ b).all())
        return Device("cpu", platform.processor() or platform.machine(), _cpus(), _free_memory(), right)
    count = torch.cuda.device_count()
    try:
        at = torch.device("cuda", local_rank)
        product = (a.to(at, torch.float32) @ b.to(at, torch.float32)).cpu()
        about = torch.cuda.get_device_properties(at)
        return Device("cuda", about.name, count, about.total_memory, bool((product.long() == a @ b).all()))
    except RuntimeError as error:  # no such device, or one that fails
        return Device("cuda", "unknown", count, 0, False, str(error).splitlines()[0])


def look_at_kernels(plan: Plan) -> tuple[str, str]:
    """A remark on what computes the model, and why it cannot be had; either may be empty. Builds what is built."""
    from titans_train.errors import UserError
    from titans_train.training.ready import check_ready

    try:
        return check_ready(plan) or "", ""
    except UserError as error:
        return "", str(error)


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _free_memory() -> int:
    """Of the node, bytes; 0: not known."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0


def place_of(plan: Plan) -> Path:
    """The run folder, or the nearest one above it that exists."""
    folder = plan.run_directory.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def look_at_disk(place: Path) -> Disk:
    """Writes a file there, flushes it, and removes it."""
    path = place / f".preflight-{socket.gethostname()}-{os.getpid()}"
    try:
        free = shutil.disk_usage(place).free
        size = min(WRITTEN, free // 4)
        block = os.urandom(1 << 20)
        started = time.perf_counter()
        with path.open("wb", buffering=0) as file:
            for _ in range(max(1, size >> 20)):
                file.write(block)
            os.fsync(file.fileno())
        seconds = time.perf_counter() - started
        return Disk(str(place), free, max(1, size >> 20) * len(block) / seconds)
    except OSError as error:
        return Disk(str(place), error=error.strerror or str(error))
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def marker(plan: Plan, word: str) -> Path:
    return place_of(plan) / f".preflight-shared-{word}"


def sees(path: Path) -> bool:
    """Whether a file that another node has written comes into sight."""
    deadline = time.monotonic() + SEEN_SECONDS
    while time.monotonic() < deadline:
        with suppress(OSError):
            if path.name in os.listdir(path.parent):
                return True
        time.sleep(0.1)
    return False


def read_data(plan: Plan) -> tuple[str, str]:
    """Fingerprint of the training data as seen from here, or why there is none. The run's folder is not touched."""
    from titans_train.data import open_dataset
    from titans_train.errors import UserError

    try:
        with tempfile.TemporaryDirectory(prefix="preflight-") as cache:
            config = plan.config.model_copy(update={"data": plan.config.data.model_copy(update={"cache": cache})})
            return json.dumps(open_dataset(config, "train", plan.shape.document_alignment).fingerprints), ""
    except (UserError, OSError) as error:
        return "", str(error)
