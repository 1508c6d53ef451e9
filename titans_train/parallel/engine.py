"""The one adapter to DeepSpeed: ZeRO stages 0 to 3 over the data-parallel ranks.

What is relied on, and held by tests/distributed/test_parity.py and tests/training/test_training.py: engine.backward
divides by the accumulation steps and averages over ranks; fp32 master weights and Adam moments can be read and set by
parameter on stages 1 to 3 (deepspeed.utils.safe_*); at stage 0 they are the torch optimiser's own.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titans_train.parallel.groups import DeepSpeedGroups, tensor_group
from titans_train.parallel.launch import device
from titans_train.parallel.mesh import Mesh
from titans_train.parallel.pieces import KINDS, MOMENTS, Piece, Pieces
from titans_train.parallel.split import join_over_ranks, split_of


def import_deepspeed(log_file: Path | None) -> Any:
    """DeepSpeed without its console messages (they go to `log_file`) and without its compiled CPU communication."""
    logging.captureWarnings(True)
    if log_file is not None and log_file.parent.is_dir():
        root = logging.getLogger()
        for old in [h for h in root.handlers if isinstance(h, logging.FileHandler)]:  # of an earlier run
            root.removeHandler(old)
            old.close()
        root.addHandler(logging.FileHandler(log_file))
    import deepspeed

    for name in ("DeepSpeed", "deepspeed"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]  # minutes of compiling
    return deepspeed


def zero_config(
    *,
    stage: int,
    bfloat16: bool,
    micro_batch_size: int,
    accumulation: int,
    gradient_clip: float,
    width: int,
    bucket: int,
    live: int,
) -> dict[str, Any]:
    """bucket: gradients that are reduced at once; live: parameters that stage 3 holds whole at once; numbers of them.

    In stage 3 vectors stay whole; matrices are dropped after use, also between forward and backward.
    """
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": False, "reduce_bucket_size": bucket}
    if stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": 2 * width,
            "stage3_max_live_parameters": live,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": live // 2,
        }
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": gradient_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bfloat16},
        "steps_per_print": 10**9,
    }


class Engine:
    """A model and its optimiser, sharded. One optimiser step is `accumulation` pairs of backward and step calls."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: dict[str, Any],
        mesh: Mesh,
        log_file: Path | None = None,
    ) -> None:
        deepspeed = import_deepspeed(log_file)
        if not deepspeed.comm.is_initialized():
            deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        dist.barrier()  # importing takes each rank as long as it takes; the groups below may wait less
        self.stage: int = config["zero_optimization"]["stage"]
        self.accumulation: int = config["gradient_accumulation_steps"]
        self.model, self.mesh = model, mesh
        whole = {type(m) for m in model.modules() if getattr(m, "holds_parameters", False)}
        if self.stage == 3 and mesh.sequence > 1 and whole:  # else shards would wait for each other in a circle
            deepspeed.utils.set_z3_leaf_modules(model, list(whole))
        deepspeed.utils.groups.mpu = None  # an earlier engine's in this process would be asked otherwise
        self._engine, *_ = deepspeed.initialize(
            model=model.to(device()), optimizer=optimizer, model_parameters=model.parameters(), config=config,
            mpu=DeepSpeedGroups(mesh) if mesh.model > 1 else None,
        )  # fmt: skip
        self._base = optimizer
        self._norm: Tensor | None = None
        self.applied = True  # the last step, on every rank alike; False: it was not finite and has changed nothing
        self._make_moments()
        self.pieces = Pieces(model, optimizer, self._engine.optimizer, self.stage, mesh)

    # ---- one step

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def loss_scale(self) -> int:
        """Multiply a loss by this, and the engine's averages add up to a plain sum over all micro-batches."""
        return self.mesh.data * self.mesh.sequence * self.accumulation

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def step(self, learning_rate: float) -> None:
        """After every backward. At the last one of a step: clips by the global norm and moves the parameters.

        Where that norm is not finite nothing is moved, on any rank, and Adam's state and count stay; see `applied`.
        """
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.stage == 0:
            self._step_whole()
        else:
            self._engine.step()
            self.applied = bool(self._engine.was_step_applied())

    def _step_whole(self) -> None:
        """Stage 0, where DeepSpeed neither reports a norm nor looks at it: torch's fused Adam can be told to pass."""
        self._norm = self._norm_of_gradients()
        self.applied = bool(torch.isfinite(self._norm))
        if not self.applied:
            self._base.found_inf = torch.ones((), device=device())  # type: ignore[attr-defined]
        self._engine.step()
        if not self.applied:
            del self._base.found_inf  # type: ignore[attr-defined]

    def _norm_of_gradients(self) -> Tensor:
        """Each parameter counted once: those that tensor-parallel ranks share on the first of them."""
        mine = [p for p in self.model.parameters() if self.mesh.tensor_rank == 0 or split_of(p) is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in mine if p.grad is not None])
        if self.mesh.tensor == 1:
            return norm
        square = norm.square()
        dist.all_reduce(square, group=tensor_group(self.mesh))
        return square.sqrt()

    def gradient_norm(self) -> float:
        """Of the last step, before clipping. Waits for the device."""
        norm = self._norm if self.stage == 0 else self._engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    # ---- the whole values by name, whatever the layout. Collective: every rank calls and iterates to the end.

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.model.named_parameters()

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Accumulated and averaged, before clipping: after the last backward of a step, before its step()."""
        from deepspeed.utils import safe_get_full_grad

        for name, parameter in self._parameters():
            gradient: Tensor | None = parameter.grad if self.stage == 0 else safe_get_full_grad(parameter)
            assert gradient is not None, f"{name} has no gradient"
            yield name, join_over_ranks(parameter, gradient, self.mesh)

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """fp32 master weights."""
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in self._parameters():
            value = parameter.detach() if self.stage == 0 else safe_get_full_fp32_param(parameter)
            yield name, join_over_ranks(parameter, value, self.mesh)

    def collected(self) -> dict[str, Tensor]:
        """The whole fp32 parameters by name, in host memory, on the first rank; {} on the others."""
        found = {}
        for name, value in self.parameters():
            if self.mesh.is_first:
                found[name] = value.detach().float().to("cpu", copy=True)
        return found

    def moments(self, key: str) -> Iterator[tuple[str, Tensor]]:
        """Adam's `exp_avg` or `exp_avg_sq`; zeros before the first step."""
        from deepspeed.utils import safe_get_full_optimizer_state

        for name, parameter in self._parameters():
            if self.stage == 0:
                value = self._base.state[parameter][key]
            else:
                value = safe_get_full_optimizer_state(parameter, key)
            yield name, join_over_ranks(parameter, value, self.mesh)

    def restore(self, read: Callable[[str, Piece], Tensor], optimizer_step: int) -> None:
        """Sets parameters and moments to `read(kind, piece)` [piece.count], and Adam's step count. Collective."""
        with torch.no_grad():
            for piece in self.pieces.held():
                for kind in KINDS:
                    self.pieces.value(kind, piece).copy_(read(kind, piece))
            self.pieces.publish()
        for state in self._base.state.values():
            state["step"].fill_(float(optimizer_step))

    def optimizer_step(self) -> int:
        """Adam's own count of steps."""
        return max((int(state["step"]) for state in self._base.state.values() if "step" in state), default=0)

    def _make_moments(self) -> None:
        """Adam's state, at zero, which it would make at its first step.

        It is needed now to be set on resume; and on stages 1 and 2 the engine links the state to the parameters in the
        middle of the first step, when only the first parameter group has one: moments of the others could not be read.
        """
        zero = self._engine.optimizer
        if self.stage == 0:
            owned = [p for group in self._base.param_groups for p in group["params"]]
        elif self.stage == 3:
            owned = zero.fp32_partitioned_groups_flat
        else:
            owned = zero.single_partition_of_fp32_groups
        for p in owned:
            if not self._base.state[p]:
                zeros = {key: torch.zeros_like(p, requires_grad=False) for key in MOMENTS}
                self._base.state[p].update(step=torch.zeros((), device=p.device), **zeros)
        if self.stage in (1, 2):
            zero._lazy_init_hp_params_optimizer_state()
