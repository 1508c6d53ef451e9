"""Training, from a plan to a finished run folder. Read `train`, then step.py."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import torch
from torch import Tensor

from titans_train.data import Batch, SyntheticDataset, TokenDataset, loader, open_dataset
from titans_train.errors import UserError
from titans_train.host import keep_freed_memory
from titans_train.models import LanguageModel, recording
from titans_train.monitoring import signals
from titans_train.monitoring.metrics import read_metrics
from titans_train.monitoring.plot import plot_loss
from titans_train.monitoring.throughput import peak_memory_bytes
from titans_train.monitoring.watchdog import PATIENCE, Heartbeat, Watchdog
from titans_train.parallel import Engine, Mesh, agree, make_parts, process_group
from titans_train.parallel.engine import zero_config
from titans_train.parallel.launch import together
from titans_train.parallel.replicas import differences
from titans_train.parallel.shards import ShardSettings
from titans_train.parallel.waits import Blocked, timed_waits
from titans_train.plan import Plan
from titans_train.training import run_folder
from titans_train.training.carried import CarriedStates
from titans_train.training.checkpoint_folder import check_disk
from titans_train.training.checkpoint_saver import Saver
from titans_train.training.decisions import asked_to_stop, decide
from titans_train.training.nonfinite import NonFinite
from titans_train.training.optimizer import learning_rate, make_optimizer
from titans_train.training.progress import Progress
from titans_train.training.ready import check_ready
from titans_train.training.reports import Reports
from titans_train.training.resume import resume
from titans_train.training.step import StepResult, train_step
from titans_train.training.validation import NeedleChecks, validate

Dataset = TokenDataset | SyntheticDataset


def build_engine(plan: Plan, mesh: Mesh) -> Engine:
    """Model and optimiser from the plan: the same initial weights on every layout."""
    config = plan.config
    torch.manual_seed(config.run.seed)  # on every rank: the initial weights do not depend on the layout
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
    """Trains to training.steps, or for `stop_after` more steps; resumes by itself. Returns the summary's figures.

    UserError, on all ranks alike, before anything is written. Requeue, on all ranks alike, after a signal to any of
    them (monitoring/signals.py).
    """
    parallel = plan.config.parallel
    timeout = timedelta(seconds=parallel.timeout_seconds)
    world_timeout = timedelta(seconds=plan.config.monitoring.hang_seconds * (PATIENCE + 1))  # the watchdog is first
    with process_group(parallel.tensor, parallel.sequence, timeout, world_timeout) as mesh:
        return train_on(mesh, plan, stop_after)


def train_on(mesh: Mesh, plan: Plan, stop_after: int | None = None) -> dict[str, Any]:
    """`train` within a group that is there already."""
    if number := asked_to_stop():
        if mesh.is_first:
            print(signals.stopped(number, 0, 0, 0), flush=True)
        raise signals.Requeue(number, 0)
    if (remark := agree(lambda: check_ready(plan), mesh)) is not None and mesh.is_first:
        print(remark, flush=True)
    agree(lambda: run_folder.check(plan), mesh, first_only=True)
    agree(lambda: check_disk(plan.run_directory, plan.checkpoint_bytes), mesh, first_only=True)
    with ExitStack() as held:
        agree(lambda: run_folder.own(plan, held), mesh, first_only=True)
        blocked, watchdog = held.enter_context(timed_waits()), held.enter_context(_watchdog(plan, mesh))
        watchdog.beat("opening the data", 0, PATIENCE)
        alignment = plan.shape.document_alignment
        data = agree(lambda: open_dataset(plan.config, "train", alignment), mesh)
        held_out = agree(lambda: open_dataset(plan.config, "validation", alignment), mesh)
        watchdog.beat("building the engine", 0, PATIENCE)
        engine = build_engine(plan, mesh)
        watchdog.beat("reading a checkpoint", 0, PATIENCE)
        carried = CarriedStates(plan, mesh) if plan.config.training.carry_state else None
        progress = resume(engine, plan, data, mesh, carried)
        agree(lambda: run_folder.write(plan), mesh, first_only=True)
        watchdog.heartbeat = Heartbeat(plan.run_directory / "heartbeat.json") if mesh.is_first else None
        run = Run(plan, mesh, engine, data.at(progress.cursor), held_out, progress, watchdog, blocked, carried)
        held.callback(run.reports.close)
        keep_freed_memory()
        return run.go(stop_after)


def _watchdog(plan: Plan, mesh: Mesh) -> Watchdog:
    """Stacks of each start of the job go to a folder of their own."""
    run, seconds = plan.run_directory, plan.config.monitoring.hang_seconds
    start = agree(lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%SZ"), mesh, first_only=True)
    return Watchdog(seconds, run / "stacks" / start, mesh.rank)


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
        watchdog: Watchdog,
        blocked: Blocked,
        carried: CarriedStates | None = None,
    ) -> None:
        self.plan, self.mesh, self.engine, self.data, self.held_out = plan, mesh, engine, data, held_out
        self.progress, self.watchdog, self.blocked, self.carried = progress, watchdog, blocked, carried
        self.config = plan.config
        self.reports = Reports(plan, mesh, progress.step)
        self.nonfinite = NonFinite(plan.run_directory, self.config.training.skip_nonfinite, mesh)
        self.saver = Saver(engine, plan, data, mesh, carried, self.reports.say, progress.step)
        self.needles = agree(lambda: NeedleChecks(plan, mesh), mesh)
        self.first_step = progress.step
        self.validated: tuple[int, float] | None = None  # (step, loss)

    @property
    def tokens(self) -> int:
        """Trained on since the run began."""
        return self.progress.sequences * self.config.training.sequence_length

    def go(self, stop_after: int | None) -> dict[str, Any]:
        steps = self.config.training.steps
        stop = steps if stop_after is None else min(steps, self.progress.step + stop_after)
        self.reports.say(self._greeting())
        for line in self.data.describe(self.progress.cursor.sequences(steps)):
            self.reports.say(f"data {line}")
        mesh, progress = self.mesh, self.progress
        batches = loader(self.data, self.plan, mesh.data_rank, progress.step, progress.cursor, mesh.sequence_rank)
        self._beat("reading the first batch", PATIENCE)
        if progress.step < stop:
            first = agree(lambda: next(batches), mesh)  # what cannot be read at all ends the start on every rank alike
            batches = itertools.chain([first], batches)
            self._beat("the first step", PATIENCE)
            self.reports.new_window()
        try:
            stopping = self._steps(batches, stop)
        except Exception as error:
            self.saver.leave(together(error))
            raise
        if stopping:
            self._leave(stopping)
        if stop < steps:
            return {}
        return self._finish()

    def _steps(self, batches: Iterator[list[Batch]], stop: int) -> int:
        """Trains up to step `stop` and saves; the number of a signal that ended it earlier, or 0."""
        stopping = asked_to_stop()
        while self.progress.step < stop and not stopping:
            self._one_step(self._next(batches))
            decision = decide({"stop": signals.received(), **self.saver.wishes()})
            self.saver.follow(decision)
            stopping = int(decision["stop"])
        self._beat("saving", PATIENCE)
        self.saver.settle()
        if self.saver.saved_step < self.progress.step:  # not begun; or it failed, and what was in the way may be gone
            self._save()
        try:
            self.saver.finish()
        except UserError as error:
            if not stopping:
                raise
            self.reports.say(str(error))  # a new start goes on from the one before
        return stopping

    def _beat(self, phase: str = "training", patience: int = 1) -> None:
        self.watchdog.beat(phase, self.progress.step, patience)

    def _next(self, batches: Iterator[list[Batch]]) -> list[Batch]:
        started = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - started
        self.reports.window.waited += waited
        self.reports.window.own += waited
        return batch

    def _leave(self, number: int) -> None:
        step = self.progress.step
        self.reports.say(signals.stopped(number, self.first_step, step, self.saver.saved_step))
        self._beat("stopped by a signal")
        raise signals.Requeue(number, step)

    def _greeting(self) -> str:
        plan, steps = self.plan, self.config.training.steps
        start = f"resumes after step {self.progress.step}" if self.progress.step else "starts"
        return (
            f"{self.config.run.name} {start}: {plan.shape.block}, {plan.parameter_count:,} parameters, {steps} steps "
            f"of {plan.tokens_per_step:,} tokens, {plan.mesh_text}, ZeRO {self.engine.stage}, "
            f"{self.config.run.dtype}; in {plan.run_directory}"
        )

    def _one_step(self, batches: list[Batch]) -> None:
        step = self.progress.step + 1
        watch, steps = self.config.monitoring, self.config.training.steps
        logs = step % watch.log_every == 0 or step in (1, steps)
        rate = learning_rate(step - 1, self.config)
        watching: AbstractContextManager[dict[int, dict[str, Tensor]]] = nullcontext({})
        if logs:
            watching = recording(self.engine.model)
        with watching as records:
            result = self._train(batches, rate)
        self.progress = replace(self.progress, step=step)
        self._beat()
        if not result.applied:
            self._pass_over(batches, result, rate)
        if logs:
            beside: dict[str, Any] = {"tokens": self.tokens, "skipped_steps": len(self.progress.skipped)}
            beside |= self.data.figures(self.progress.sequences)
            self.reports.log(step, result.loss(), self.engine.gradient_norm(), rate, beside, records)
        if watch.validate_every and step % watch.validate_every == 0 and step < steps:
            self._validate()
        if self.needles.due(step):
            self._look_for_needles()
        if watch.sample_every and step % watch.sample_every == 0:
            self._sample()
        if watch.compare_every and step % watch.compare_every == 0:
            self._compare()
        if step % self.config.checkpoint.every == 0:
            self._save()

    def _train(self, batches: list[Batch], rate: float) -> StepResult:
        window, blocked, started = self.reports.window, self.blocked.seconds, time.perf_counter()
        result = train_step(self.engine, batches, rate, carried=self.carried)
        window.own += time.perf_counter() - started - (self.blocked.seconds - blocked)
        window.tokens += self.plan.tokens_per_step
        window.steps += 1
        return result

    def _pass_over(self, batches: list[Batch], result: StepResult, rate: float) -> None:
        step = self.progress.step
        self.progress = replace(self.progress, skipped=(*self.progress.skipped, step))
        line = self.nonfinite.passed_over(self.progress, self.engine, batches, result, rate, self.carried)
        self.reports.say(line)
        self.reports.write(step, {"skipped_steps": len(self.progress.skipped)})
        self._beat()

    def _look_for_needles(self) -> None:
        found = self.needles.run(self.engine, partial(self._beat, "looking for needles"))
        self.reports.write(self.progress.step, {"tokens": self.tokens, **found})
        for name, by_length in found.items():
            accuracy = ", ".join(f"{int(at[3:]):,} tokens {value:.1%}" for at, value in by_length.items())
            self.reports.say(f"step {self.progress.step}: {name.replace('_', ' ')}: {accuracy}")
        self._back_to_training()

    def _validate(self) -> dict[str, Any]:
        training, watch = self.config.training, self.config.monitoring
        figures = validate(
            self.engine, self.held_out, watch.validation_sequences, training.micro_batch_size, self.mesh,
            partial(self._beat, "validation"),
        )  # fmt: skip
        self.reports.write(self.progress.step, {"tokens": self.tokens, **figures})
        self.validated = (self.progress.step, figures["validation_loss"])
        per_byte = figures.get("validation_bits_per_byte")
        rest = "" if per_byte is None else f", {per_byte:.4f} bits per byte"
        self.reports.say(f"step {self.progress.step}: validation loss {figures['validation_loss']:.4f}{rest}")
        self._back_to_training()
        return figures

    def _sample(self) -> None:
        """Text from a copy of the current model on the first rank: no rank waits in a sharded forward of one."""
        if self.config.data.source != "shards":
            return
        self._beat("sampling text")
        values = self.engine.collected()
        if self.mesh.is_first:
            from titans_train.data.dataset import tokenizer_of_data
            from titans_train.inference import sample_text

            copy = LanguageModel(self.plan.shape).eval()
            copy.load_state_dict(values)
            watch = self.config.monitoring
            text = sample_text(copy, tokenizer_of_data(self.config), watch.sample_prompt, watch.sample_tokens)
            self.reports.sample(self.progress.step, text)
        self._back_to_training()

    def _compare(self) -> None:
        """Before a save: what has gone wrong in one copy is not to be kept."""
        self._beat("comparing replicas")
        found = differences(self.engine)
        if found:
            raise UserError(
                f"at step {self.progress.step} copies that should be equal differ: {'; '.join(found[:8])}"
                + (f" and {len(found) - 8} more" if len(found) > 8 else "")
                + ". Memory or arithmetic of such a device is at fault, or a library: start again without that host. "
                f"The newest checkpoint, from which the run goes on, is of step {self.saver.saved_step}", agreed=True,
            )  # fmt: skip
        self._back_to_training()

    def _save(self) -> None:
        self._beat("saving", PATIENCE)
        step = self.progress.step
        loss = self.validated[1] if self.validated is not None and self.validated[0] == step else None
        self.saver.save(self.progress, loss)
        self.reports.write(step, {"checkpoint_blocked_seconds": self.saver.blocked_seconds})
        self._back_to_training()

    def _back_to_training(self) -> None:
        self._beat()
        self.reports.new_window()

    def _finish(self) -> dict[str, Any]:
        """Final validation, picture and summary, unless they are there."""
        folder = self.plan.run_directory
        lines = read_metrics(folder / "metrics.jsonl")
        summarised = agree(lambda: run_folder.summarised_steps(self.plan), self.mesh, first_only=True)
        if self.first_step == self.progress.step == summarised:
            self.reports.say(f"{self.config.run.name} is finished; nothing to do. Results are in {folder}")
            return {}
        figures: dict[str, Any] = dict(self._validate())
        last = [line for line in lines if "loss" in line][-1:]
        figures |= {
            "steps": self.progress.step,
            "tokens": self.tokens,
            "loss": last[0]["loss"] if last else None,
            "skipped_steps": len(self.progress.skipped),
        }
        if self.reports.trained_seconds:
            figures["tokens_per_second"] = self.reports.trained_tokens / self.reports.trained_seconds
        figures["peak_memory_bytes"] = peak_memory_bytes()
        if self.mesh.is_first:
            try:
                plot_loss(read_metrics(folder / "metrics.jsonl"), folder / "loss.png", self.config.run.name)
            except OSError as error:
                self.reports.say(f"{folder / 'loss.png'} could not be written ({error.strerror or error})")
        agree(lambda: run_folder.write_summary(self.plan, figures), self.mesh, first_only=True)
        self.reports.say(f"finished; results are in {folder}")
        self._beat("finished")
        return figures
