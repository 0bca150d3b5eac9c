"""The training loop: train, look, save, and stop at any moment without losing a step."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from jetflow import hosts, sharding
from jetflow import pictures as samples
from jetflow import workdir as workdirs
from jetflow.checkpoint import Checkpoints, NotFinite
from jetflow.data.reading import Ahead
from jetflow.evals import likelihoods as bpd
from jetflow.files import METRICS, read_json
from jetflow.hosts import Stopped, StopSignal
from jetflow.noise import Noise, Purpose, key_for
from jetflow.sampling.ancestral import draw_all, not_finite
from jetflow.training.experiment import Run
from jetflow.training.log import Reporter, make_grid, save_png
from jetflow.training.step import Metrics, TrainState
from jetflow.types import Batch

DIVERGED = 3  # an exit status: to run the command again would end the same way


class Diverged(Exception):
    """The loss or its gradient is not finite; the message says since when."""


def train(run: Run, workdir: Path) -> int:
    """Train, or go on training, in `workdir`. The exit status: 0; `DIVERGED` where the loss is no
    longer finite; or 128 + the signal's number.

    Killed at any moment and called again, it ends with the same parameters, optimizer state,
    averages and metrics as if it had never been interrupted.
    """
    train = run.config.train
    checkpoints = Checkpoints(
        workdir / "checkpoints", keep=train.keep_checkpoints, keep_every=train.keep_every or None
    )
    with StopSignal() as stop, checkpoints, workdirs.claimed(workdir) as claim:
        # What cannot start must leave nothing behind: the first state comes before `begin`.
        begins = hosts.agreed(checkpoints.latest() is None)
        fresh, origin = run.fresh_state() if begins else (None, "")
        claim.begin(run.resolved_config)
        state, start = (fresh, 0) if fresh is not None else checkpoints.restore(run.abstract_state)
        workdirs.note_environment(workdir, start)
        with Reporter(workdir, start_step=start, total_steps=run.total_steps) as reporter:
            try:
                Session(run, workdir, checkpoints, reporter, stop.poll).go(state, start, origin)
            except Stopped as stopped:
                return 128 + stopped.signal
            except Diverged as error:
                reporter.say(f"jetflow: {error}")
                return DIVERGED
    return 0


@dataclasses.dataclass
class Session:
    """One process's part of a run: from a step to the end, or to a signal."""

    run: Run
    workdir: Path
    checkpoints: Checkpoints
    reporter: Reporter
    poll: Callable[[], None]
    _pending: tuple[int, Metrics] | None = None

    def go(self, state: TrainState, start: int, origin: str = "") -> None:
        """Train from step `start` to the end.

        Args:
            origin: what is to be said of a fresh state that was made of another run's weights.
        """
        self.reporter.say(self._headline(state, start))
        if origin:
            self.reporter.say(origin)
            self._save(state, start)  # the other run may go on, or be deleted
        step, total = start, self.run.total_steps
        batches: Ahead[Batch, Batch] | None = None
        try:
            self._look(state, start, resumed=True)  # for what an interruption cut off
            if start < total:
                batches = self.run.batches(start)  # which are read while the step compiles
                train_step = self._compile(state)
                with self.reporter.pause():
                    batch = next(batches)
            for step in range(start + 1, total + 1):
                # It runs on the device while the last one is logged and the next batch comes.
                state, metrics = train_step(state, batch)
                self._log(step, metrics)
                if batches and step < total:
                    batch, waited = batches.after(metrics)
                    self.reporter.waited(waited)
                self._look(state, step)
                if step % self.run.config.train.checkpoint_every == 0:
                    self._save(state, step)
                self.poll()
        except Stopped:
            self._save(state, step)
            self.checkpoints.wait()
            self.reporter.say(
                f"stopped at step {step} of {total}, all saved in {self.workdir}: "
                "run the same command again to go on"
            )
            raise
        finally:
            if batches:
                batches.close()
        self._save(state, step)
        self.checkpoints.wait()
        self._conclude()

    def _compile(self, state: TrainState) -> Callable:
        self.reporter.say("compiling the training step")
        batch = self.run.abstract_batch(self.run.config.train.batch_size)
        with self.reporter.pause():
            compiled = self.run.lower_step(state, batch).compile()
        self.poll()
        return compiled

    def _log(self, step: int, metrics: Metrics) -> None:
        """Note the metrics of a step, and write those of the step before, which has ended."""
        self._flush()
        self._pending = (step, metrics)

    def _flush(self) -> None:
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        train = self.run.config.train
        metric = bpd.metric_name(self.run.trainer.noise)
        now = float(metrics["bpd"])  # waits for the step: never more than two are under way
        if not math.isfinite(now + float(metrics["gradient_norm"])):
            raise self._diverged(f"step {step}: the loss or its gradient is not finite")
        if due := step % train.log_every == 0 or step in (1, self.run.total_steps):
            values = {
                name.replace("bpd", metric): float(value)
                for name, value in jax.device_get(metrics).items()
            }
            self.reporter.write(step, values | self.reporter.speed(step, train.batch_size))
        self.reporter.progress(step, f"{metric} {now:.3f}", train.batch_size, log=due)

    def _look(self, state: TrainState, step: int, *, resumed: bool = False) -> None:
        """Held-out likelihood and a picture of samples, where they are due.

        A resumed run makes up for those of its first step that are not there.
        """
        train = self.run.config.train
        last = step == self.run.total_steps
        evaluates = last or (step and train.eval_every and step % train.eval_every == 0)
        noises = [self.run.trainer.noise] if evaluates else []
        if last and self.run.trainer.noise.kind != "uniform":
            noises.append(bpd.UNIFORM)  # noised data has no bpd; the images have
        for noise in noises:
            metric = bpd.metric_name(noise)
            written = hosts.is_first() and workdirs.result_path(self.workdir, metric, step).exists()
            done = resumed and written and self.reporter.has(step, f"test_{metric}")
            if not hosts.agreed(done):
                self._flush()
                draws = self.run.config.eval.draws if last else 1
                with self.reporter.pause():
                    self._evaluate(state, step, noise, draws=draws)
        samples_now = last or (step and train.sample_every and step % train.sample_every == 0)
        if samples_now and not hosts.agreed(resumed and self._picture(step).exists()):
            self._flush()
            with self.reporter.pause():
                self._sample(state, step)

    def _evaluate(self, state: TrainState, step: int, noise: Noise, *, draws: int) -> None:
        likelihood = bpd.measure(
            self.run.trainer.flow,
            state.variables(),
            self.run.test_data,
            mesh=self.run.mesh,
            noise=noise,
            draws=draws,
            batch_size=self.run.config.eval.batch_size,
            poll=self.poll,
        )
        weights = "params" if state.ema is None else "ema"
        result = bpd.record(likelihood, noise, self.run.test_data, step=step, weights=weights)
        workdirs.write_result(self.workdir, result)
        self.reporter.write(step, {f"test_{bpd.metric_name(noise)}": likelihood.mean})
        if step < self.run.total_steps or noise.kind != "uniform":
            self.reporter.say(f"step {step}: held-out {bpd.describe(result)}")

    def _sample(self, state: TrainState, step: int) -> None:
        flow, noise, section = self.run.trainer.flow, self.run.trainer.noise, self.run.config.eval
        labels, rows = samples.rows_by_class(section.samples, flow.num_classes)
        sampler = self.run.sampler(state.variables())
        batches = []
        key = key_for(0, 0, Purpose.SAMPLE)
        for drawn in draw_all(sampler, key, num=section.samples, label=labels):
            batches.append(drawn)
            self.poll()
        if complaint := not_finite(np.concatenate([drawn.finite for drawn in batches])):
            self.reporter.say(f"step {step}: {complaint}")
        images = [drawn.images(noise.kind) for drawn in batches]
        grid = make_grid(np.concatenate(images), rows)
        self.reporter.picture(step, "samples", grid)
        save_png(self._picture(step), grid)

    def _picture(self, step: int) -> Path:
        return self.workdir / "samples" / f"step_{step:08d}.png"

    def _save(self, state: TrainState, step: int) -> None:
        """Start saving the state; the metrics up to it are on disk before."""
        self._flush()
        with self.reporter.pause():
            try:
                self.checkpoints.save(step, state, self.run.resolved_config)
            except NotFinite as error:
                raise self._diverged(f"step {step}: {error}") from error

    def _diverged(self, cause: str) -> Diverged:
        self.checkpoints.wait()
        last = self.checkpoints.latest()
        return Diverged(
            f"{cause}, so the training ended; "
            + ("no checkpoint is finite" if last is None else f"step {last} is the last finite one")
            + " in the workdir; lower config.optim.lr, or set config.optim.clip_norm, in another"
            " --workdir"
        )

    def _headline(self, state: TrainState, start: int) -> str:
        run = self.run
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(run.abstract_state.params))
        kind = run.config.flow.kind
        lines = [
            f"{kind} with {count:,} parameters on {sharding.describe(run.mesh)}; the state takes "
            f"{sharding.bytes_held(state) / 1e6:,.1f} MB a device",
            f"train on {run.train_data.describe()}",
            f"test on {run.test_data.describe()}",
            self._plan(start),
        ]
        return "\n".join(lines)

    def _plan(self, start: int) -> str:
        total, size = self.run.total_steps, self.run.config.train.batch_size
        if start >= total:
            return f"all {total} steps were done before"
        if start:
            return f"resumed at step {start} of {total}, of {size} images each"
        source = self.run.config.init_from
        return f"{total} steps of {size} images each" + (f", from {source}" if source else "")

    def _conclude(self) -> None:
        """The last lines: the result, and where everything is."""
        if not hosts.is_first():
            return
        result = read_json(workdirs.result_path(self.workdir, "bpd", self.run.total_steps))
        evaluation = workdirs.result_path(self.workdir, "bpd", self.run.total_steps)
        self.reporter.say(
            f"done: step {self.run.total_steps}, held-out {bpd.describe(result)}\n"
            f"samples      {self._picture(self.run.total_steps)}\n"
            f"evaluation   {evaluation}\n"
            f"metrics      {self.workdir / METRICS}, and TensorBoard events beside it\n"
            f"checkpoints  {self.workdir / 'checkpoints'}"
        )
