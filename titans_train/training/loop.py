"""Training, from a plan to a finished run folder. Read `train`, then step.py."""

from __future__ import annotations

import itertools
import time
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from titans_train.data import RecallDataset, TokenDataset, loader, open_dataset
from titans_train.errors import UserError
from titans_train.models import LanguageModel, recording
from titans_train.monitoring.console import Console
from titans_train.monitoring.metrics import Metrics, read_metrics
from titans_train.monitoring.plot import plot_loss
from titans_train.monitoring.throughput import measured_peak_flops, peak_memory_bytes
from titans_train.parallel import Engine, Mesh, agree, gather, make_parts, mean_over_ranks, process_group
from titans_train.parallel.engine import zero_config
from titans_train.parallel.shards import ShardSettings
from titans_train.plan import Plan
from titans_train.training import checkpoint, run_folder
from titans_train.training.carried import CarriedStates
from titans_train.training.checkpoint import Progress
from titans_train.training.optimizer import learning_rate, make_optimizer
from titans_train.training.step import StepResult, train_step
from titans_train.training.validation import validate

Dataset = TokenDataset | RecallDataset


def build_engine(plan: Plan, mesh: Mesh) -> Engine:
    """Model and optimiser from the plan: the same initial weights on every layout."""
    config = plan.config
    checkpoint.set_seed(config.run.seed)
    model = LanguageModel(plan.shape, make_parts(mesh, config.parallel.sequence_parallel, shard_settings(plan)))
    model.activation_checkpointing = config.training.activation_checkpointing
    settings = zero_config(
        stage=config.parallel.zero_stage,
        bfloat16=config.run.dtype == "bfloat16",
        micro_batch_size=config.training.micro_batch_size * plan.sequence.wave,
        accumulation=plan.accumulation // plan.sequence.wave,
        gradient_clip=config.optimizer.gradient_clip,
        width=plan.shape.width,
        bucket=plan.zero.bucket,
        live=plan.zero.live,
    )
    return Engine(model, make_optimizer(model, config), settings, mesh, plan.run_directory / "libraries.log")


def shard_settings(plan: Plan) -> ShardSettings | None:
    """How the scan crosses sequence shards; None where sequences are whole."""
    s = plan.sequence
    if s.shards == 1:
        return None
    return ShardSettings(s.length, s.pieces, s.strategy, plan.config.training.carry_state)


def train(plan: Plan, stop_after: int | None = None) -> dict[str, Any]:
    """Trains to training.steps, or for `stop_after` more steps; resumes by itself. Returns the summary's figures."""
    parallel = plan.config.parallel
    timeout = timedelta(seconds=parallel.timeout_seconds)
    with process_group(parallel.tensor, parallel.sequence, timeout) as mesh:
        return train_on(mesh, plan, stop_after)


def train_on(mesh: Mesh, plan: Plan, stop_after: int | None = None) -> dict[str, Any]:
    """`train` within a group that is there already. UserError, on all ranks alike, before anything is written."""
    agree(lambda: run_folder.check(plan), mesh, first_only=True)
    agree(lambda: checkpoint.check_disk(plan.run_directory, plan.checkpoint_bytes), mesh, first_only=True)
    with ExitStack() as held:
        agree(lambda: run_folder.own(plan, held), mesh, first_only=True)
        alignment = plan.shape.document_alignment
        data = agree(lambda: open_dataset(plan.config, "train", alignment), mesh)
        held_out = agree(lambda: open_dataset(plan.config, "validation", alignment), mesh)
        engine = build_engine(plan, mesh)
        carried = CarriedStates(plan, mesh) if plan.config.training.carry_state else None
        progress = checkpoint.resume(engine, plan, data, mesh, carried)
        agree(lambda: run_folder.write(plan), mesh, first_only=True)
        run = Run(plan, mesh, engine, data.at(progress.cursor), held_out, progress, carried)
        if run.metrics is not None:
            held.callback(run.metrics.close)
        return run.go(stop_after)


def layer_figures(records: dict[int, dict[str, torch.Tensor]], mesh: Mesh) -> dict[str, dict[str, float]]:
    """Means over all ranks (their heads and tokens; each has as many) of what the memory layers recorded.

    Norms are of the states that sequences end with, which are the last shards'. Collective.
    """
    names = [(n, key) for n, values in records.items() for key in values]
    if not names:
        return {}
    ends = mesh.sequence if mesh.sequence_rank == mesh.sequence - 1 else 0
    mine = torch.stack([records[n][key].double() * (ends if "norm" in key else 1) for n, key in names])
    means = mean_over_ranks(mine).tolist()
    figures: dict[str, dict[str, float]] = {}
    for (n, key), mean in zip(names, means, strict=True):
        figures.setdefault(f"layer_{n}", {})[key] = mean
    return figures


@dataclass
class Window:
    """Time and tokens since the last logged step."""

    started: float
    tokens: int = 0
    waited: float = 0.0  # for data


class Run:
    """The loop over steps and what happens beside it: logs, validation, samples, checkpoints."""

    def __init__(
        self,
        plan: Plan,
        mesh: Mesh,
        engine: Engine,
        data: Dataset,
        held_out: Dataset,
        progress: Progress,
        carried: CarriedStates | None = None,
    ) -> None:
        self.plan, self.mesh, self.engine, self.data, self.held_out = plan, mesh, engine, data, held_out
        self.progress, self.carried = progress, carried
        self.config = plan.config
        watch = self.config.monitoring
        self.metrics = Metrics(plan.run_directory, progress.step, watch.tensorboard) if mesh.is_first else None
        self.console = Console(mesh.is_first, progress.step, self.config.training.steps)
        self.peak_flops = watch.peak_flops or measured_peak_flops()
        self.window = Window(time.perf_counter())
        self.first_step, self.saved_step = progress.step, progress.step
        self.trained_seconds, self.trained_tokens = 0.0, 0

    @property
    def tokens(self) -> int:
        """Trained on since the run began."""
        return self.progress.sequences * self.config.training.sequence_length

    def go(self, stop_after: int | None) -> dict[str, Any]:
        steps = self.config.training.steps
        stop = steps if stop_after is None else min(steps, self.progress.step + stop_after)
        self.console.say(self._greeting())
        for line in self.data.describe(self.progress.cursor.sequences(steps)):
            self.console.say(f"data {line}")
        mesh, progress = self.mesh, self.progress
        batches = loader(self.data, self.plan, mesh.data_rank, progress.step, progress.cursor, mesh.sequence_rank)
        if progress.step < stop:
            first = agree(lambda: next(batches), mesh)  # what cannot be read at all ends the start on every rank alike
            batches = itertools.chain([first], batches)
            self.window = Window(time.perf_counter())
        while self.progress.step < stop:
            started = time.perf_counter()
            step_batches = next(batches)
            self.window.waited += time.perf_counter() - started
            self._one_step(step_batches)
        if self.saved_step < self.progress.step:
            self._save()
        if stop < steps:
            return {}
        return self._finish()

    def _greeting(self) -> str:
        plan, steps = self.plan, self.config.training.steps
        start = f"resumes after step {self.progress.step}" if self.progress.step else "starts"
        return (
            f"{self.config.run.name} {start}: {plan.shape.block}, {plan.parameter_count:,} parameters, {steps} steps "
            f"of {plan.tokens_per_step:,} tokens, {plan.mesh_text}, ZeRO {self.engine.stage}, "
            f"{self.config.run.dtype}; in {plan.run_directory}"
        )

    def _one_step(self, batches: list[Any]) -> None:
        step = self.progress.step + 1
        watch = self.config.monitoring
        logs = step % watch.log_every == 0 or step in (1, self.config.training.steps)
        rate = learning_rate(step - 1, self.config)
        watching: AbstractContextManager[dict[int, dict[str, torch.Tensor]]] = nullcontext({})
        if logs:
            watching = recording(self.engine.model)
        with watching as records:
            result = train_step(self.engine, batches, rate, carried=self.carried)
        self.progress = Progress(step, self.progress.cursor)
        self.window.tokens += self.plan.tokens_per_step
        if logs:
            self._log(result, rate, records)
        if watch.validate_every and step % watch.validate_every == 0 and step < self.config.training.steps:
            self._validate()
        if watch.sample_every and step % watch.sample_every == 0:
            self._sample()
        if step % self.config.checkpoint.every == 0:
            self._save()

    def _log(self, result: StepResult, rate: float, records: dict[int, dict[str, torch.Tensor]]) -> None:
        """The only place of a step that waits for the device."""
        loss, norm = result.loss(), self.engine.gradient_norm()
        seconds = time.perf_counter() - self.window.started
        speed = self.window.tokens / seconds
        self.trained_seconds, self.trained_tokens = (
            self.trained_seconds + seconds,
            self.trained_tokens + self.window.tokens,
        )
        figures: dict[str, Any] = {
            "loss": loss, "grad_norm": norm, "learning_rate": rate, "tokens": self.tokens,
            "tokens_per_second": speed,
            "mfu": speed * self.plan.flops_per_token / (self.peak_flops * self.plan.world_size),
            "peak_memory_bytes": peak_memory_bytes(), "data_wait": max(gather(self.window.waited)) / seconds,
        }  # fmt: skip
        figures |= self.data.figures(self.progress.sequences)
        figures |= layer_figures(records, self.mesh)
        if self.metrics is not None:
            self.metrics.write(self.progress.step, figures)
        self.console.progress(self.progress.step, loss, norm, rate, speed)
        if loss != loss:
            raise UserError(
                f"the loss is NaN at step {self.progress.step}; lower optimizer.learning_rate or memory.theta_max. "
                f"The last checkpoint, of step {self.saved_step}, is untouched", agreed=True,
            )  # fmt: skip
        self.window = Window(time.perf_counter())

    def _validate(self) -> dict[str, float]:
        training, watch = self.config.training, self.config.monitoring
        figures = validate(self.engine, self.held_out, watch.validation_sequences, training.micro_batch_size, self.mesh)
        if self.metrics is not None:
            self.metrics.write(self.progress.step, {"tokens": self.tokens, **figures})
        per_byte = figures.get("validation_bits_per_byte")
        rest = "" if per_byte is None else f", {per_byte:.4f} bits per byte"
        self.console.say(f"step {self.progress.step}: validation loss {figures['validation_loss']:.4f}{rest}")
        self.window = Window(time.perf_counter())
        return figures

    def _sample(self) -> None:
        """Text from a copy of the current model on the first rank: no rank waits in a sharded forward of one."""
        if self.config.data.source != "shards":
            return
        values = checkpoint.collect(self.engine.parameters(), self.mesh)
        if self.mesh.is_first:
            from titans_train.data.dataset import tokenizer_of_data
            from titans_train.inference import sample_text

            copy = LanguageModel(self.plan.shape).eval()
            copy.load_state_dict(values)
            watch = self.config.monitoring
            text = sample_text(copy, tokenizer_of_data(self.config), watch.sample_prompt, watch.sample_tokens)
            self.console.say(f"step {self.progress.step}, sample:\n{text}")
            if self.metrics is not None:
                self.metrics.text(self.progress.step, "sample", text)
        self.window = Window(time.perf_counter())

    def _save(self) -> None:
        checkpoint.save(self.engine, self.plan, self.progress, self.data, self.mesh, self.carried)
        self.saved_step = self.progress.step
        self.window = Window(time.perf_counter())

    def _finish(self) -> dict[str, Any]:
        """Final validation, picture and summary."""
        folder = self.plan.run_directory
        lines = read_metrics(folder / "metrics.jsonl")
        if self.first_step == self.progress.step and (folder / "summary.json").exists():
            self.console.say(f"{self.config.run.name} is finished; nothing to do. Results are in {folder}")
            return {}
        figures: dict[str, Any] = dict(self._validate())
        last = [line for line in lines if "loss" in line][-1:]
        figures |= {
            "steps": self.progress.step,
            "tokens": self.tokens,
            "loss": last[0]["loss"] if last else None,
        }
        if self.trained_seconds:
            figures["tokens_per_second"] = self.trained_tokens / self.trained_seconds
        figures["peak_memory_bytes"] = peak_memory_bytes()
        if self.mesh.is_first:
            plot_loss(read_metrics(folder / "metrics.jsonl"), folder / "loss.png", self.config.run.name)
            run_folder.write_summary(self.plan, figures)
        self.console.say(f"finished; results are in {folder}")
        return figures
