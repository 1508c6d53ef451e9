"""flash-linear-attention's kernels in the place of scan.py: when they are taken, what they are given, what they give.

Their own run on a GPU (marked gpu), and without one in Triton's interpreter where Triton is installed. What they are
given is checked everywhere, with the reference formulas beside them in float64.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from tests.hostile.refusals import refused
from tests.inference.checkpoints import config as checkpoint_config
from tests.inference.checkpoints import write_checkpoint
from tests.memory.peer_cases import CASES, document_starts, errors, leaves
from tests.memory.test_peers import fla
from tests.models.shapes import tiny
from titans_train.__main__ import main
from titans_train.config.checks import check_config
from titans_train.config.schema import RunConfig
from titans_train.errors import UserError
from titans_train.memory.layer import MemoryLayerState
from titans_train.memory.peers import kernels
from titans_train.memory.peers.kernels import Terms, check, fla_scan, handed, uses_fla
from titans_train.memory.peers.layer import PeerMemory
from titans_train.models.parts import SingleDevice
from titans_train.plan import resolve_shape
from titans_train.shape import PEERS, ModelShape

TRITON = importlib.util.find_spec("triton") is not None
NO_GPU = not torch.cuda.is_available()
FUNCTIONS = {
    "deltanet": "chunk_delta_rule", "gated_deltanet": "chunk_gated_delta_rule", "mamba2": "chunk_simple_gla",
    "rwkv7": "chunk_dplr_delta_rule",
}  # fmt: skip


class _Torch:
    """torch for their reference formulas, which name float32."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@cache
def reference(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """Their formula for what `name` computes, with the arguments of `name`."""
    file, formula = {
        "chunk_delta_rule": ("delta_rule", "delta_rule_recurrence"),
        "chunk_gated_delta_rule": ("gated_delta_rule", "naive_recurrent_gated_delta_rule"),
        "chunk_simple_gla": ("simple_gla", "naive_recurrent_simple_gla"),
        "chunk_dplr_delta_rule": ("generalized_delta_rule/dplr", "dplr_recurrence"),
    }[name]
    module: Any = fla(f"ops/{file}/naive.py")
    module.torch = _Torch()
    theirs = getattr(module, formula)

    def sequence(given: dict[str, Any], state: Tensor) -> tuple[Tensor, Tensor]:
        if name in ("chunk_gated_delta_rule", "chunk_simple_gla"):
            return theirs(**given, initial_state=state, output_final_state=True)
        given = {n: x.transpose(1, 2) for n, x in given.items() if isinstance(x, Tensor)}  # heads first, scale d^-1/2
        order = ["q", "k", "v", *(["beta"] if name == "chunk_delta_rule" else ["a", "b", "gk"])]
        given["q"] = given["q"] * given["q"].shape[-1] ** 0.5
        y, after = theirs(*(given[n] for n in order), state)
        return y.transpose(1, 2), after

    def whole(
        *, initial_state: Tensor, output_final_state: bool, cu_seqlens: Tensor | None = None, **given: Any
    ) -> tuple[Tensor, Tensor]:
        assert output_final_state and given["scale"] == 1
        given.pop("lower_bound", None)
        if cu_seqlens is None:
            return sequence(given, initial_state)
        assert given["q"].shape[0] == 1 and len(initial_state) == len(cu_seqlens) - 1
        found = [
            sequence({n: x[:, a:b] if isinstance(x, Tensor) else x for n, x in given.items()}, initial_state[i : i + 1])
            for i, (a, b) in enumerate(zip(cu_seqlens, cu_seqlens[1:], strict=False))
        ]
        return torch.cat([y for y, _ in found], 1), torch.cat([s for _, s in found])

    return whole


@pytest.mark.parametrize(("rule", "carried", "documents"), CASES)
def test_what_the_kernels_are_given_makes_the_recurrence(
    monkeypatch: pytest.MonkeyPatch, rule: str, carried: bool, documents: bool
) -> None:
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    monkeypatch.setattr(kernels, "_function", reference)
    given, starts = leaves(rule, carried, torch.float64), document_starts() if documents else None
    assert handed(Terms(**{n: x for n, x in given.items() if n != "state"}), torch.float64)[0] == FUNCTIONS[rule]
    got = errors(lambda t, s, d: fla_scan(t, s, d, torch.float64), given, starts, torch.float64, "cpu")
    assert max(got.values()) < 1e-11, got


def test_the_delta_rule_in_float32_is_the_gated_one_without_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    """chunk_delta_rule refuses float32."""
    monkeypatch.setattr(kernels, "_function", reference)
    given = leaves("deltanet", True, torch.float32)
    terms = Terms(**{n: x.float() for n, x in given.items() if n != "state"})
    name, arguments = handed(terms, torch.float32)
    assert name == "chunk_gated_delta_rule" and not arguments["g"].any()
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    got = errors(lambda t, s, d: fla_scan(t, s, d, torch.float32), given, None, torch.float64, "cpu")
    assert max(got.values()) < 1e-6, got


@pytest.mark.parametrize("rule", PEERS)
def test_the_kernels_multiply_in_the_models_dtype_and_keep_decays_rates_and_states_exact(rule: str) -> None:
    given = leaves(rule, False, torch.bfloat16)
    _, arguments = handed(Terms(**{n: x.float() for n, x in given.items() if n != "state"}), torch.bfloat16)
    tensors = {n: x.dtype for n, x in arguments.items() if isinstance(x, Tensor)}
    assert {n for n, dtype in tensors.items() if dtype == torch.float32} == tensors.keys() & {"g", "gk", "beta"}
    assert {tensors[n] for n in tensors.keys() & set("qkvab")} == {torch.bfloat16}


@pytest.mark.parametrize("choice", ["auto", "plain", "fla"])
def test_tensors_on_the_cpu_never_go_to_the_kernels(monkeypatch: pytest.MonkeyPatch, choice: str) -> None:
    monkeypatch.setattr(kernels, "_unusable", lambda: None)  # as on a machine with a GPU
    q = torch.zeros(1, 2, 64, 64)
    assert not any(uses_fla(choice, q, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64))


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
def test_training_with_the_kernels_without_a_gpu_is_refused_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = {"name": "r", "folder": str(tmp_path / "runs")}
    values = checkpoint_config(tmp_path, "lmm", model={"heads": 1}, memory={"rule": "rwkv7"}).model_dump(mode="json")
    values |= {"run": values["run"] | run, "attention": {"persistent_tokens": 0}}
    values |= {"data": {"source": "recall", "recall": {"pairs": 2, "keys": 4, "values": 4, "gap": 4}}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    error = refused(capsys, "train", str(tmp_path / "r.yaml"), "memory.peer_kernels=fla")
    assert "memory.peer_kernels is fla, but there is no CUDA device: " in error and "use auto or plain" in error
    assert not (tmp_path / "runs").exists()
    check("auto"), check("plain")


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
def test_a_checkpoint_trained_with_the_kernels_is_used_without_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for choice in ("fla", "auto"):
        memory = {"rule": "rwkv7", "peer_kernels": choice}
        made = checkpoint_config(tmp_path / choice, "mag", model={"heads": 1}, memory=memory)
        checkpoint = str(write_checkpoint(made))
        capsys.readouterr()
        assert main(["generate", checkpoint, "--prompt", "import ", "--tokens", "20"]) == 0
        texts.append(capsys.readouterr().out)
        assert main(["export", checkpoint, str(tmp_path / f"{choice}.out")]) == 0
        assert main(["generate", str(tmp_path / f"{choice}.out"), "--prompt", "import ", "--tokens", "20"]) == 0
        assert capsys.readouterr().out.endswith(texts[-1])
    assert texts[0] == texts[1]


def test_asking_for_kernels_that_cannot_be_imported_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "_unusable", kernels._unusable.__wrapped__)
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in [name for name in sys.modules if name.split(".")[0] == "fla"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match="cannot be imported .*triton.* install the extra peers"):
        check("fla")


def config(**memory: Any) -> RunConfig:
    """Heads of 8."""
    return RunConfig.model_validate(
        {
            "run": {"name": "r"},
            "model": {"block": "lmm", "layers": 1, "width": 16, "heads": 2, "vocabulary": 8},
            "memory": {"rule": "mamba2", "chunk_size": 4, **memory},
            "data": {"path": "d"},
            "training": {"steps": 1, "sequence_length": 8, "global_batch_size": 1, "micro_batch_size": 1},
        }
    )


def test_a_head_width_that_the_kernels_do_not_take_is_refused_where_they_are_asked_for() -> None:
    (problem,) = check_config(config(peer_kernels="fla"))
    assert (
        "even widths of 16 to 256; heads are 8 wide" in str(problem.message) and problem.path == "memory.peer_kernels"
    )
    assert not check_config(config()) and not check_config(config(peer_kernels="plain"))


def test_the_choice_reaches_the_model_and_is_no_part_of_what_it_is() -> None:
    shape = resolve_shape(config(peer_kernels="plain"))
    assert shape.memory is not None and shape.memory.peer_kernels == "plain"
    assert shape.to_dict() == resolve_shape(config()).to_dict()
    again = ModelShape.from_dict(shape.to_dict())
    assert again == replace(shape, memory=replace(shape.memory, peer_kernels="auto"))


@cache
def interpreted() -> dict[tuple[str, str], list[dict[str, float]]]:
    """{(rule, dtype): errors of each case}"""
    command = [sys.executable, "-m", "tests.memory.interpreted_kernels", "float32", "float16"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for rule, _, _, dtype, far in json.loads(done.stdout.splitlines()[-1]):
        found.setdefault((rule, dtype), []).append(far)
    return found


@pytest.mark.skipif(not TRITON, reason="Triton is not installed")
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("float16", 3e-3)])
@pytest.mark.parametrize("rule", PEERS)
def test_the_kernels_interpreted_on_the_cpu_equal_the_scan(rule: str, dtype: str, limit: float) -> None:
    found = interpreted()[rule, f"torch.{dtype}"]
    assert len(found) == 2 and all(far < limit for case in found for far in case.values()), found


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 5e-3), (torch.bfloat16, 2e-2)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize(("rule", "carried", "documents"), CASES)
def test_the_kernels_on_a_gpu_equal_the_scan(
    rule: str, carried: bool, documents: bool, dtype: torch.dtype, limit: float
) -> None:
    """Limits: numbers of 11 bits (TF32) and 8 bits; float16, 11 bits, is off by up to 1e-3 when interpreted."""
    check("fla")
    given, starts = leaves(rule, carried, dtype, width=64), document_starts() if documents else None
    got = errors(lambda t, s, d: fla_scan(t, s, d, dtype), given, starts, torch.float32, "cuda")
    assert all(far < limit for far in got.values()), got


@pytest.mark.gpu
@pytest.mark.parametrize("rule", PEERS)
def test_a_bfloat16_memory_on_a_gpu_takes_the_kernels_by_itself_and_comes_to_the_same(
    monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    used, found = [], kernels._function
    monkeypatch.setattr(kernels, "_function", lambda name: (used.append(name), found(name))[1])
    outputs = {}
    for choice in ("auto", "plain"):
        torch.manual_seed(0)
        shape = tiny(f"lmm-{rule}", width=128, head_dim=64, memory={"peer_kernels": choice, "chunk_size": 16})
        memory = PeerMemory(shape, SingleDevice()).cuda()
        widths = {"memory_q": 128, "memory_k": 128, "memory_v": 128, **shape.peer_gates()}
        given = {name: torch.randn(2, 96, width, device="cuda").bfloat16() for name, width in widths.items()}
        memory = memory.bfloat16()
        start = MemoryLayerState(memory.initial_memory(2), memory.empty_tails(given["memory_q"]))
        outputs[choice] = memory(given, start)[0].float()
    assert used == [FUNCTIONS[rule]]
    assert (outputs["auto"] - outputs["plain"]).norm() < 3e-2 * outputs["plain"].norm()
