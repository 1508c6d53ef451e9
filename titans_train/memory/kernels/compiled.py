"""Builds the C++ of cpp/ once per machine and PyTorch, and calls it for a segment: rows are spread over the threads.

The built library lies in $TITANS_TRAIN_CACHE (else $XDG_CACHE_HOME/titans-train, ~/.cache/titans-train), under a name
made from its source, PyTorch's version, the CPU's capability and its own hash. It is put there whole, and not loaded if
it is not: a build that was killed, or a file that was damaged, is built anew.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from titans_train.memory.activation import Gelu
from titans_train.memory.recurrence import NORM_EPS
from titans_train.memory.walk import Segment, Sequence, SequenceGradients
from titans_train.shape import part_tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from titans_train.memory.chunk import Adjoints

SOURCE = Path(__file__).parent / "cpp"
CAPABILITIES = {
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}
LEAST_TOKENS = 48  # of a part of a chunk: smaller ones cost more than their T x T matrices save
PATIENCE = 600  # seconds for another process that builds the same
OPERATORS = ("titans_train::scan_forward", "titans_train::scan_backward")


@functools.cache
def why_not() -> str | None:
    """Builds and loads what this process will call; None, or why it cannot be had, with a remedy."""
    try:
        folder = cache()
        torch.ops.load_library(_built(folder) or _build_once(folder))
    except (OSError, RuntimeError, Timeout) as error:
        cause = "" if error.__cause__ is None else f" ({error.__cause__})"
        return (
            f"its C++ cannot be built and loaded: {error}{cause}; a folder to build in can be named in "
            "TITANS_TRAIN_CACHE, a compiler in CXX"
        )
    for name in OPERATORS:
        torch.library.register_fake(name, lambda *_: None)  # they only fill what they are given
    return None


def cache() -> Path:
    if named := os.environ.get("TITANS_TRAIN_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "titans-train"


def _capability() -> str:
    return torch.backends.cpu.get_cpu_capability()


@functools.cache
def _fingerprint() -> str:
    known = hashlib.sha256(f"{torch.__version__} {platform.machine()} {_capability()} {_flags()}".encode())
    for file in sorted(SOURCE.iterdir()):
        known.update(file.read_bytes())
    return known.hexdigest()[:16]


def _flags() -> list[str]:
    at = _capability()
    capability = CAPABILITIES.get(at, [])
    if capability:
        capability = [*capability, f"-DCPU_CAPABILITY={at}", f"-DCPU_CAPABILITY_{at}"]
    return ["-std=c++20", "-O3", "-fopenmp", "-fPIC", "-shared", *capability]


def _name(content: bytes) -> str:
    return f"scan-{_fingerprint()}-{hashlib.sha256(content).hexdigest()[:16]}.so"


def _built(folder: Path) -> Path | None:
    """What is there and whole."""
    for library in folder.glob(f"scan-{_fingerprint()}-*.so"):
        if library.name == _name(library.read_bytes()):
            return library
    return None


def _build_once(folder: Path) -> Path:
    """Of several processes one builds; where no lock can be had, each does, to the same end."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(FileLock(folder / f"scan-{_fingerprint()}.lock", timeout=PATIENCE))
        except (OSError, NotImplementedError) as error:
            if isinstance(error, Timeout):
                raise
        return _built(folder) or _build(folder)


def _build(folder: Path) -> Path:
    from torch.utils import cpp_extension

    compiler = shlex.split(os.environ.get("CXX") or "c++")
    if shutil.which(compiler[0]) is None:
        raise RuntimeError(f"there is no compiler {compiler[0]!r}: install one such as g++, or name it in CXX")
    includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    paths = [f"-L{path}" for path in cpp_extension.library_paths()]
    with tempfile.TemporaryDirectory() as working:
        made = Path(working) / "scan.so"
        command = [*compiler, *_flags(), *includes, str(SOURCE / "scan.cpp"), *paths, "-lc10", "-ltorch_cpu"]
        done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
        if done.returncode != 0 or not made.exists():
            said = done.stderr.strip().splitlines()
            errors = [line for line in said if "error" in line.lower()][:3]
            told = "; ".join(dict.fromkeys(errors + said[-2:])) or "it said nothing"
            raise RuntimeError(f"{shlex.join(compiler)} ended with {done.returncode}: {told}")
        content = made.read_bytes()
    return _put(content, folder)


def _put(content: bytes, folder: Path) -> Path:
    """On the disk before it has its name."""
    library, part = folder / _name(content), folder / f"{os.getpid()}.part"
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.chmod(0o755)
        part.replace(library)
    finally:
        part.unlink(missing_ok=True)
    return library


@dataclass(frozen=True)
class Launch:
    """One segment of a call."""

    seq: Sequence
    segment: Segment

    def _call(self) -> list[Any]:
        seq, segment = self.seq, self.segment
        parts, per_chunk = segment.in_parts(part_tokens(segment.size, least=LEAST_TOKENS))
        gain, bias = (None, None) if seq.norm is None else (seq.norm.gain.contiguous(), seq.norm.bias.contiguous())
        return [
            seq.q, seq.k, seq.v, seq.keep, seq.eta, seq.theta, seq.starts,
            [x.contiguous() for x in (*seq.document_weights, *seq.document_momentum)], gain, bias,
            parts.start, parts.chunks, parts.size, per_chunk, isinstance(seq.act, Gelu), NORM_EPS,
        ]  # fmt: skip

    def forward(
        self, weights: list[Tensor], momentum: list[Tensor], y: Tensor, surprises: list[Tensor] | None = None
    ) -> None:
        found = None if surprises is None else torch.empty_like(self.seq.theta)
        torch.ops.titans_train.scan_forward(*self._call(), [*weights, *momentum], y, found)
        if surprises is not None and found is not None:
            surprises += [found[:, span] for span in self.segment.spans()]

    def backward(
        self, weights: list[Tensor], momentum: list[Tensor], d_y: Tensor, adjoints: Callable[[], Adjoints],
        found: SequenceGradients,
    ) -> None:  # fmt: skip
        adj = adjoints()
        torch.ops.titans_train.scan_backward(
            *self._call(), [*weights, *momentum], d_y, [*adj.weights, *adj.momentum], found.q, found.k, found.v,
            found.keep, found.eta, found.theta, found.gain, found.bias, found.document,
        )  # fmt: skip
