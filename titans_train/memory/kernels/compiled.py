"""Builds the C++ of cpp/ once per machine and PyTorch, and calls it for a segment: rows are spread over the threads.

The built library lies in $TITANS_TRAIN_CACHE (else ~/.cache/titans-train), under a name made from its source, PyTorch's
version and the CPU's capability, and is put there whole: a build that was killed leaves nothing that others wait for.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from titans_train.memory.activation import Gelu
from titans_train.memory.recurrence import NORM_EPS
from titans_train.memory.walk import Segment, Sequence, SequenceGradients

if TYPE_CHECKING:
    from collections.abc import Callable

    from titans_train.memory.chunk import Adjoints

SOURCE = Path(__file__).parent / "cpp"
CAPABILITIES = {
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}
PATIENCE = 600  # seconds for another process that builds the same


@functools.cache
def why_not() -> str | None:
    """Builds and loads what this process will call; None, or why it cannot be had, with a remedy."""
    try:
        library = cache() / f"scan-{_fingerprint()}.so"
        if not library.exists():
            _build_once(library)
        torch.ops.load_library(library)
    except (OSError, RuntimeError, Timeout) as error:
        return f"its C++ cannot be built and loaded: {error}"
    return None


def cache() -> Path:
    return Path(os.environ.get("TITANS_TRAIN_CACHE", "~/.cache/titans-train")).expanduser()


def _capability() -> str:
    return torch.backends.cpu.get_cpu_capability()


def _fingerprint() -> str:
    known = hashlib.sha256(f"{torch.__version__} {_capability()} {_flags()}".encode())
    for file in sorted(SOURCE.iterdir()):
        known.update(file.read_bytes())
    return known.hexdigest()[:16]


def _flags() -> list[str]:
    at = _capability()
    capability = CAPABILITIES.get(at, [])
    if capability:
        capability = [*capability, f"-DCPU_CAPABILITY={at}", f"-DCPU_CAPABILITY_{at}"]
    return ["-std=c++20", "-O3", "-fopenmp", "-fPIC", "-shared", *capability]


def _build_once(library: Path) -> None:
    """Of several processes one builds; where no lock can be had, each does, to the same end."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(library.with_suffix(".lock"), timeout=PATIENCE):
        if not library.exists():
            _build(library)


def _build(library: Path) -> None:
    from torch.utils import cpp_extension

    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise RuntimeError(f"there is no compiler {compiler!r}: install one such as g++, or name it in CXX")
    includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    paths = [f"-L{path}" for path in cpp_extension.library_paths()]
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        command = [compiler, *_flags(), *includes, str(SOURCE / "scan.cpp"), *paths, "-lc10", "-ltorch_cpu"]
        done = subprocess.run([*command, "-o", str(built)], capture_output=True, text=True)
        if done.returncode != 0:
            said = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()
            raise RuntimeError(f"{compiler} ended with {done.returncode}: " + "; ".join(said[:3]))
        built.replace(library)


@dataclass(frozen=True)
class Launch:
    """One segment of a call."""

    seq: Sequence
    segment: Segment

    def _call(self) -> list[Any]:
        seq, segment = self.seq, self.segment
        gain, bias = (None, None) if seq.norm is None else (seq.norm.gain.contiguous(), seq.norm.bias.contiguous())
        return [
            seq.q, seq.k, seq.v, seq.keep, seq.eta, seq.theta, seq.starts,
            [x.contiguous() for x in (*seq.document_weights, *seq.document_momentum)], gain, bias,
            segment.start, segment.chunks, segment.size, isinstance(seq.act, Gelu), NORM_EPS,
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
