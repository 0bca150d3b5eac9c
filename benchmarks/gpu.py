"""What jetflow does on one NVIDIA card, beside PyTorch, in ten minutes at most:

    python benchmarks/gpu.py --out gpu
    python benchmarks/gpu.py --out gpu --parts sample     # again, with all the time for one part

gpu.json and gpu.md in the folder are written anew after each task. What is there of other parts
stays. Each task is a process of its own with a bound on its time: one that fails or takes too long
is recorded with the reason, and the others go on. Programs of JAX and PyTorch take turns and never
share the card. docs/benchmarks.md says what is measured. With --size toy it is a trial of the
script on a CPU.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import gpu_runs
import gpu_tasks
from gpu_sizes import ROOT, SIZES, Setting, Skip

# part -> its share of the time that is left, and its tasks with their arguments, in order
PARTS: dict[str, tuple[float, tuple[str, ...]]] = {
    "peak": (0.3, ("peak jetflow", "peak torch")),
    "train": (2.0, (
        "train tarflow cudnn full", "train tarflow xla full", "train jet cudnn full",
        "train jet xla full", "plan tarflow CARD full", "plan jet CARD full",
    )),
    "torch": (1.5, (  # by turns
        "train tarflow auto none", "torch_train", "train tarflow auto none", "torch_train",
        "plan tarflow CARD none",
    )),
    "sample": (2.0, ("fit", "sample cached", "torch_sample", "sample jacobi", "sample auto")),
    "bpd": (0.8, ("fit", "bpd")),
    "resume": (1.2, ("resume plain", "resume deterministic")),
}  # fmt: skip
CARDS = {  # as nvidia-smi names them -> topology
    "NVIDIA H200": "h200:1",
    "NVIDIA H100 80GB HBM3": "h100:1",
    "NVIDIA A100-SXM4-80GB": "a100:1",
    "NVIDIA B200": "b200:1",
}
SKIPPED = 3  # exit status of a task that cannot run on this machine

# part -> columns of its table: title, field of a record, format
COLUMNS = {
    "peak": (("by", "by", ""), ("matrix", "size", ""), ("TFLOP/s", "tflops", ".1f")),
    "train": (
        ("by", "by", ""), ("flow", "flow", ""), ("attention", "attention", ""),
        ("remat", "remat", ""), ("batch", "batch_size", ""), ("ms a step", "step_ms", ".1f"),
        ("images/s", "images_per_second", ".1f"), ("share of the peak", "share_of_peak", ".1%"),
        ("GiB by the compiler", "peak_gib", ".1f"), ("GiB in use", "in_use_gib", ".1f"),
    ),
    "sample": (
        ("by", "by", ""), ("method", "method", ""), ("batch", "batch_size", ""),
        ("seconds", "seconds", ".2f"), ("images/s", "images_per_second", ".2f"),
        ("sweeps of the blocks", "sweeps", ""), ("windows", "windows", ""),
    ),
    "bpd": (
        ("net", "dtype", ""), ("precision", "precision", ""), ("attention", "attention", ""),
        ("bpd", "bpd", ".5f"), ("difference", "difference", "+.1e"),
        ("largest of an image", "largest_difference", ".1e"),
    ),
    "resume": (
        ("XLA", "how", ""), ("steps", "steps", ""), ("killed at", "killed_at", ""),
        ("resumed from", "resumed_from", ""), ("arrays that differ", "differing_arrays", ""),
        ("of", "arrays", ""), ("first step that differs", "first_step_that_differs", ""),
    ),
}  # fmt: skip
COLUMNS["torch"] = COLUMNS["train"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of gpu.json and gpu.md")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of " + ",".join(PARTS))
    parser.add_argument("--seconds", type=float, help="of each part; default: shares of --minutes")
    parser.add_argument("--minutes", type=float, default=9.5, help="of all parts together")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument(
        "--scratch", type=Path, default=Path(tempfile.gettempdir(), "jetflow_gpu"),
        help="for compiled programs, data and a trained TarFlow, which later calls use again",
    )  # fmt: skip
    parser.add_argument(
        "--task", nargs=2, help=argparse.SUPPRESS
    )  # this process is one: task, file
    arguments = parser.parse_args()
    arguments.scratch = arguments.scratch.absolute()
    if arguments.task:
        sys.exit(do_task(arguments))
    parts = arguments.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"--parts has {', '.join(unknown)}; expected some of {', '.join(PARTS)}")
    if arguments.out is None:
        parser.error("--out is missing; expected a folder, which is made")
    if arguments.out.is_file():
        parser.error(f"--out is {arguments.out}, a file; expected a folder")
    if not SIZES[arguments.size].for_cpu and not cards():
        parser.error("nvidia-smi shows no NVIDIA card; --size toy tries the script on a CPU")
    arguments.out.mkdir(parents=True, exist_ok=True)
    report = Report(arguments.out, parts, arguments.size)
    end = time.monotonic() + 60 * arguments.minutes
    for number, part in enumerate(parts):
        weights = [PARTS[name][0] for name in parts[number:]]
        share = (end - time.monotonic()) * weights[0] / sum(weights)
        run_part(report, part, min(arguments.seconds or share, end - time.monotonic()), arguments)
    print(f"wrote {arguments.out}/gpu.json and gpu.md")


def run_part(report: "Report", part: str, seconds: float, arguments: argparse.Namespace) -> None:
    """The tasks of a part, one after another, until its time is over."""
    end = time.monotonic() + seconds
    for task in PARTS[part][1]:
        left, start = end - time.monotonic(), time.monotonic()
        topology = report.topology
        if left < 5:
            records, outcome = [], "not begun: the time of the part was over"
        elif "CARD" in task and not topology:
            records, outcome = [], "skipped: no card that is planned for"
        else:
            print(f"{part}: {task} ({left:.0f} s left)", flush=True)
            words = task.replace("CARD", topology)
            records, outcome = run_task(words, left, arguments)
        took = time.monotonic() - start
        report.add(part, task, records, outcome, took)
        print(f"{part}: {task}: {outcome} in {took:.0f} s", flush=True)


def run_task(
    task: str, seconds: float, arguments: argparse.Namespace
) -> tuple[list[dict[str, Any]], str]:
    """What a task measured, also if it was cut off, and how it ended."""
    folder = arguments.scratch / arguments.size
    folder.mkdir(parents=True, exist_ok=True)
    log, results = (folder / f"{task.replace(' ', '_')}.{end}" for end in ("log", "jsonl"))
    results.write_text("")
    command = [sys.executable, __file__, "--size", arguments.size, "--seconds", str(seconds)]
    command += ["--scratch", str(folder), "--task", task, str(results)]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment(folder), start_new_session=True
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with what it started
                process.wait()
    lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
    outcomes = {0: "done", None: f"cut off after {seconds:.0f} s", SKIPPED: f"skipped: {lines[-1]}"}
    outcome = outcomes.get(status, f"failed (status {status}): {lines[-1]}")
    return [json.loads(line) for line in results.read_text().splitlines()], outcome


def environment(folder: Path) -> dict[str, str]:
    """Of a task: this clone, memory as it is needed, and programs compiled once."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    defaults = {
        "TFDS_DATA_DIR": str(folder / "data"),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "CUDA_VISIBLE_DEVICES": "0",  # one card, for both frameworks
        "XLA_CLIENT_MEM_FRACTION": "0.92",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    if cards():  # or JAX would go on without it where it cannot use it
        defaults["JAX_PLATFORMS"] = "cuda,cpu"
    return {**defaults, **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def do_task(arguments: argparse.Namespace) -> int:
    """Do a task in this process; its results go to a file, line by line."""
    (name, *words), results = arguments.task[0].split(), Path(arguments.task[1])
    size = SIZES[arguments.size]
    tasks = gpu_tasks.TASKS | gpu_runs.TASKS
    setting = Setting(size, arguments.scratch, arguments.seconds)
    try:
        with results.open("a") as file:
            for result in tasks[name](setting, *words):
                print(json.dumps(result), file=file, flush=True)
    except ModuleNotFoundError as error:
        print(f"the package {error.name} is not installed", file=sys.stderr)
        return SKIPPED
    except Exception as error:
        # jetflow's UsageError by name: without jetflow there is none.
        if isinstance(error, Skip) or type(error).__name__ == "UsageError":
            print(error, file=sys.stderr)
            return SKIPPED
        traceback.print_exc()
        print(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        return 1
    return 0


class Report:
    """The files gpu.json and gpu.md."""

    def __init__(self, folder: Path, parts: list[str], size: str):
        self.json, self.markdown = folder / "gpu.json", folder / "gpu.md"
        old = json.loads(self.json.read_text()) if self.json.exists() else {}
        same = old.get("size") == size
        kept = {part: done for part, done in old.get("parts", {}).items() if part not in parts}
        self.content = {"size": size, "machine": machine(), "parts": kept if same else {}}

    @property
    def topology(self) -> str:
        """The name that `jetflow plan` has for the card; "" for none."""
        card = self.content["machine"]["card"]
        return CARDS.get(card.partition(",")[0], "")

    def add(self, part: str, task: str, records: list, outcome: str, seconds: float) -> None:
        entry = {"task": task, "outcome": outcome, "seconds": round(seconds, 1), "records": records}
        self.content["parts"].setdefault(part, []).append(entry)
        self.derive()
        self.json.write_text(json.dumps(self.content, indent=1) + "\n")
        self.markdown.write_text(markdown(self.content))

    def derive(self) -> None:
        """What follows from several records: shares of the measured peak."""
        records = [
            record for entries in self.content["parts"].values() for entry in entries
            for record in entry["records"]
        ]  # fmt: skip
        peak = 1e12 * max((record["tflops"] for record in records if "tflops" in record), default=0)
        flops = {  # a step of PyTorch's takes as many as one of jetflow's
            (record["flow"], record["batch_size"]): record["model_flops"]
            for record in records if "model_flops" in record
        }  # fmt: skip
        for record in records:
            if seconds := record.get("step_seconds"):
                record["step_ms"] = 1000 * seconds
                work = flops.get((record["flow"], record["batch_size"]))
                record["share_of_peak"] = work / seconds / peak if work and peak else None
            for name, gib in (("peak_bytes", "peak_gib"), ("peak_bytes_in_use", "in_use_gib")):
                if record.get(name):
                    record[gib] = record[name] / 2**30


def machine() -> dict[str, Any]:
    """The card, the processor, versions, and the commit."""
    versions = {}
    for package in ("jax", "jaxlib", "flax", "torch"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "card": (*cards(), "no NVIDIA card")[0],
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": output(["git", "-C", str(ROOT), "rev-parse", "HEAD"]) or "unknown",
    }


def cards() -> list[str]:
    """Name, memory and driver of each."""
    query = ["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    return output(["nvidia-smi", *query]).splitlines()


def output(command: list[str]) -> str:
    """What a command prints; nothing where there is no such command, or it fails."""
    if not shutil.which(command[0]):
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def markdown(content: dict[str, Any]) -> str:
    """A table a part, and a line for each task that has none, or did not end well."""
    about = content["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    machine = f"{about['cores']} cores; Python {about['python']}, {versions}"
    lines = [f"# {about['card']}", ""]
    lines += [f"Size {content['size']}; {machine}; commit {about['commit'][:10]}.", ""]
    for part, entries in content["parts"].items():
        columns, notes = COLUMNS[part], []
        lines += [f"## {part}", ""]
        lines += ["| " + " | ".join(title for title, *_ in columns) + " |"]
        lines += ["|" + "---|" * len(columns)]
        for entry in entries:
            if entry["task"] == "fit":
                facts = (
                    f"{name} {value}" for one in entry["records"] for name, value in one.items()
                )
                notes += ["- the TarFlow: " + ", ".join(facts)] if entry["records"] else []
            else:
                rows = [[cell(one.get(field), style) for _, field, style in columns]
                        for one in entry["records"]]  # fmt: skip
                lines += ["| " + " | ".join(row) + " |" for row in rows]
            if entry["outcome"] != "done":
                notes += [f"- `{entry['task']}`: {entry['outcome']}"]
        lines += ["", *notes, *([""] if notes else [])]
    return "\n".join(lines)


def cell(value: Any, style: str) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return format(value, style)


if __name__ == "__main__":
    main()
