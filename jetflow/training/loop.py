"""The training loop: train, look, save, and stop at any moment without losing a step."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

from jetflow import hosts, rollcall, sharding
from jetflow import workdir as workdirs
from jetflow.archive import collect
from jetflow.buckets import AnyPath, as_path
from jetflow.checkpoint import Checkpoints, NotFinite
from jetflow.data import dataset as pipeline
from jetflow.data.reading import Ahead
from jetflow.evals import likelihoods as bpd
from jetflow.evals import records
from jetflow.evals.batching import Batching
from jetflow.files import METRICS, read_json, read_or_set_aside
from jetflow.noise import NOISY, Noise, Purpose, key_for
from jetflow.options import DataOptions, option
from jetflow.pictures import labels_in_turn, samples_grid, save_png
from jetflow.sampling.ancestral import Drawn, draw_all, not_finite
from jetflow.signals import Stopped, StopSignal
from jetflow.training import footprint
from jetflow.training.experiment import Run, set_up
from jetflow.training.log import Reporter
from jetflow.training.step import Metrics, TrainState
from jetflow.types import Batch, Config


class Diverged(Exception):
    """Loss, gradient or parameters are not finite; the message names the last finite checkpoint."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions(DataOptions):
    """What `train` takes, as flags."""

    config: Any = option(example="configs/NAME.py")
    workdir: AnyPath = option(help="the folder of the run", example="runs/NAME")
    extend: bool = option(False, "go on with the run in --workdir to a greater length")


def train(
    config: Config,
    workdir: str | os.PathLike,
    *,
    extend: bool = False,
    **data: Any,
) -> None:
    """Train, or go on training, in `workdir`.

    Killed at any moment and called again, it ends with the same parameters, optimizer state,
    averages and metrics as if it had never been interrupted.

    Args:
        config: an ml_collections ConfigDict with the sections of configs/base.py.
        extend: accept a config that is longer than that of the run. The schedule is then that of
            the new length, from the next step on, which environment.json records.
        data: where the data sets are: fields of `DataOptions`, such as data_dir.

    Raises:
        UsageError: the config cannot work, or the workdir is not free for it.
        Diverged: the loss, its gradient or the parameters are no longer finite.
        Stopped: a signal asked for it; everything is saved.
    """
    workdir = as_path(workdir)
    run = set_up(config, functools.partial(pipeline.load, **data))
    section = run.config.train
    checkpoints = Checkpoints(
        workdir / "checkpoints", keep=section.keep_checkpoints, keep_every=section.keep_every
    )
    # The claim is the last to go: a save in progress ends before another process may clean up.
    with StopSignal() as stop, workdirs.claimed(workdir) as claim, checkpoints:
        # What cannot start must leave nothing behind: the first state comes before `begin`.
        rollcall.reach("the first state")
        begins = hosts.agreed(checkpoints.latest() is None)
        fresh, table = run.fresh_state() if begins else (None, "")
        before = hosts.by_first(lambda: claim.begin(run.resolved_config, extend=extend))
        state, start = (fresh, 0) if fresh is not None else checkpoints.restore(run.abstract_state)
        rollcall.reach("the files of the run")
        doubt = footprint.doubt(run, workdirs.scan_environments(workdir)[0])
        workdirs.note_environment(
            workdir, start, total_steps=run.total_steps, attention=str(run.attention)
        )
        with Reporter(workdir, start_step=start, total_steps=run.total_steps) as reporter:
            notes = [line for line in (table, doubt) if line]
            if before < run.total_steps:
                notes += [
                    f"extended from {before} to {run.total_steps} steps: from step {start} on, the "
                    "learning rate follows the schedule of the new length"
                ]
            Session(run, workdir, checkpoints, reporter, stop.poll).go(state, start, notes)


@dataclasses.dataclass
class Session:
    """One process's part of a run: from a step to the end, or to a signal."""

    run: Run
    workdir: AnyPath
    checkpoints: Checkpoints
    reporter: Reporter
    poll: Callable[[], None]
    _pending: tuple[int, Metrics] | None = None

    def go(self, state: TrainState, start: int, notes: list[str]) -> None:
        """Train from step `start` to the end.

        Args:
            notes: where the state comes from, if not from this config alone.
        """
        self.reporter.say("\n".join([self._headline(state, start), *notes]))
        if notes and not start:
            self._save(state, start)  # the run that it starts from may go on, or be deleted
        step, total = start, self.run.total_steps
        batches: Ahead[Batch, Batch] | None = None
        try:
            self._look(state, start, resumed=True)  # for what an interruption cut off
            if start < total:
                batches = self.run.batches(start)  # which are read while the step compiles
                self.reporter.say("compiling the training step")
                rollcall.reach("the compilation of the training step")
                with self.reporter.pause():
                    train_step = self._compile(state)
                    self.poll()
                    rollcall.reach("the first batch")
                    batch = next(batches)
            for step in range(start + 1, total + 1):
                rollcall.reach(f"step {step}")
                # It runs on the device while the last one is logged and the next batch comes.
                state, metrics = train_step(state, batch)
                self._flush()
                self._pending = (step, metrics)
                if batches and step < total:
                    batch, waited = batches.after(metrics)
                    self.reporter.waited += waited
                self._look(state, step)
                if step % self.run.config.train.checkpoint_every == 0:
                    self._save(state, step)
                self.checkpoints.check()
                self.poll()
        except Stopped:
            self._save(state, step, wait=True)
            self.reporter.say(
                f"stopped at step {step} of {total}, all saved in {self.workdir}: "
                "run the same command again to go on"
            )
            raise
        finally:
            if batches:
                batches.close()
        self._save(state, step, wait=True)
        self._conclude()

    def _compile(self, state: TrainState) -> jax.stages.Compiled:
        abstract = self.run.abstract_batch(self.run.config.train.batch_size)
        with footprint.explained(self.run):
            train_step = self.run.lower_step(state, abstract).compile()
        workdirs.note_memory(self.workdir, **footprint.measured(self.run, train_step))
        return train_step

    def _flush(self) -> None:
        """Write the metrics of the last step: never more than two are under way."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        section, name = self.run.config.train, bpd.metric_name(self.run.trainer.noise)
        bits = float(metrics["bpd"])  # waits for the step
        if not math.isfinite(bits + float(metrics["gradient_norm"])):
            raise self._diverged(f"step {step}: the loss or its gradient is not finite")
        text = f"{name} {bits:.3f}"
        self.reporter.progress(step, text)
        if step % section.log_every == 0 or step in (1, self.run.total_steps):
            values = jax.device_get(metrics).items()
            values = {metric.replace("bpd", name): float(value) for metric, value in values}
            self.reporter.log(step, values, text, section.batch_size)

    def _look(self, state: TrainState, step: int, *, resumed: bool = False) -> None:
        """Held-out likelihood and a picture of samples, where they are due.

        A resumed run makes up for those of its first step that are missing.
        """
        section, noise = self.run.config.train, self.run.trainer.noise
        last = step == self.run.total_steps

        def due(every: int) -> bool:
            return last or bool(step and every and step % every == 0)

        # Noised data has no bpd; the images, or the arrays, have.
        exact = noise.of_data(self.run.train_data.image_shape)
        noises = [noise] + [exact] * (last and exact.kind != noise.kind)
        for noise in noises if due(section.eval_every) else []:
            name = bpd.metric_name(noise)
            path = workdirs.result_path(self.workdir, name, step)
            written = resumed and read_or_set_aside(path, workdirs.LIKELIHOOD, None) is not None
            if not hosts.agreed(written and self.reporter.has(step, f"test_{name}")):
                self._flush()
                self._evaluate(state, step, noise, last)
        if due(section.sample_every) and not hosts.agreed(resumed and self._picture(step).exists()):
            self._flush()
            self._sample(state, step)

    def _evaluate(self, state: TrainState, step: int, noise: Noise, last: bool) -> None:
        section, data, flow = self.run.config.eval, self.run.test_data, self.run.trainer.flow
        rollcall.reach(f"the evaluation of step {step}")
        with self.reporter.pause():
            density = bpd.Density(
                flow, state.variables(), Batching(self.run.mesh, section.batch_size), noise,
                draws=section.draws if last else 1,
            )  # fmt: skip
            likelihood = density.likelihood(data, self.poll)
        result = likelihood.record(step=step, weights="params" if state.ema is None else "ema")
        workdirs.write_result(self.workdir, result)
        if not self.reporter.has(step, name := f"test_{bpd.metric_name(noise)}"):
            self.reporter.write(step, {name: likelihood.mean})
        if not last or noise.kind in NOISY:
            self.reporter.say(f"step {step}: held-out {records.describe(result)}")

    def _sample(self, state: TrainState, step: int) -> None:
        flow, num = self.run.trainer.flow, self.run.config.eval.samples
        rollcall.reach(f"the samples of step {step}")
        labels = labels_in_turn(num, flow.num_classes)
        sampler, key = self.run.sampler(state.variables()), key_for(0, 0, Purpose.SAMPLE)
        batches = draw_all(sampler, key, num=num, label=labels)
        with self.reporter.pause():
            drawn = collect(self._polled(batches), self.run.trainer.noise.kind, num=num, keep=num)
        if complaint := not_finite(drawn.finite):
            self.reporter.say(f"step {step}: {complaint}")
        grid = samples_grid(drawn.images, labels)
        self.reporter.picture(step, "samples", grid)
        save_png(self._picture(step), grid)

    def _polled(self, batches: Iterable[Drawn]) -> Iterator[Drawn]:
        for drawn in batches:
            yield drawn
            self.poll()

    def _picture(self, step: int) -> AnyPath:
        return self.workdir / "samples" / f"step_{step:08d}.png"

    def _save(self, state: TrainState, step: int, *, wait: bool = False) -> None:
        """Start saving the state; the metrics up to it are on disk before."""
        self._flush()
        rollcall.reach(f"the checkpoint of step {step}")
        with self.reporter.pause():
            self.reporter.mirror.copy(wait=True)
            rollcall.reach_barrier()
            try:
                self.checkpoints.save(step, state, self.run.resolved_config)
                if wait:
                    self.checkpoints.wait()
            except NotFinite as error:
                raise self._diverged(f"step {step}: {error}") from error

    def _diverged(self, cause: str) -> Diverged:
        self.checkpoints.wait()
        last = self.checkpoints.latest()
        saved = "no checkpoint is" if last is None else f"the checkpoint of step {last} is the last"
        return Diverged(
            f"{cause}, so the training ended; {saved} finite in {self.workdir}; lower "
            "config.optim.lr, or set config.optim.clip_norm, in another --workdir"
        )

    def _headline(self, state: TrainState, start: int) -> str:
        run, total = self.run, self.run.total_steps
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(run.abstract_state.params))
        held = sharding.bytes_per_device(state) / 1e6
        plan = f"resumed at step {start} of {total}" if start else f"{total} steps"
        plan += f" of {run.config.train.batch_size} images each"
        if run.config.init_from and not start:
            plan += f", from {run.config.init_from}"
        if start >= total:
            plan = f"all {total} steps were done before"
        return (
            f"{run.config.flow.kind} with {count:,} parameters on {sharding.describe(run.mesh)}; "
            f"the state takes {held:,.1f} MB a device; attention: {run.attention}\n"
            f"train on {run.train_data.describe()}\ntest on {run.test_data.describe()}\n{plan}"
        )

    def _conclude(self) -> None:
        """The last lines: the result, and where everything is."""
        if not hosts.is_first():
            return
        total = self.run.total_steps
        exact = self.run.trainer.noise.of_data(self.run.train_data.image_shape)
        evaluation = workdirs.result_path(self.workdir, bpd.metric_name(exact), total)
        self.reporter.say(
            f"done: step {total}, held-out {records.describe(read_json(evaluation))}\n"
            f"samples      {self._picture(total)}\n"
            f"evaluation   {evaluation}\n"
            f"metrics      {self.workdir / METRICS}, and TensorBoard events beside it\n"
            f"checkpoints  {self.workdir / 'checkpoints'}"
        )
