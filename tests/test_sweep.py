"""Sweeps: the algebra of grids, points that are measured once, and a kill in between."""

import csv
import re
import shlex
import shutil
import signal
import time

import filelock
import html_page
import jax
import numpy as np
import pytest
import tiny_runs

import jetflow
from jetflow import cli, sweeps
from jetflow.sweeps import Sweep, axis, chain, product, together
from jetflow.tools.sweep import runner
from jetflow.tools.sweep.store import Store
from jetflow.training.loop import Diverged
from jetflow.types import UsageError

SHIPPED = sorted((tiny_runs.ROOT / "configs" / "sweeps").glob("*.py"))

# Four points of one trained flow, of which each has its own value.
POINTS = f'''"""Draws and seeds.

Of the noise.
"""

from jetflow.sweeps import Sweep, axis, product


def get_sweep():
    return Sweep(
        product(axis("draws", [1, 2]), axis("seed", [3, 4])),
        metrics=("noised_bpd",),
        config="{tiny_runs.ROOT}/configs/digits_tarflow.py",
        fixed={{"batch_size": 64}},
        pictures=4,
    )
'''


def test_algebra_of_grids():
    def values(grid):
        return [{name: one.value for name, one in point.items()} for point in grid.points]

    a, b = axis("a", np.arange(1, 3)), axis("b", {"few": (1,), "many": (1, 2)})
    assert values(product(a, b)) == [
        {"a": 1, "b": (1,)}, {"a": 1, "b": (1, 2)}, {"a": 2, "b": (1,)}, {"a": 2, "b": (1, 2)},
    ]  # fmt: skip
    assert values(together(a, b)) == [{"a": 1, "b": (1,)}, {"a": 2, "b": (1, 2)}]
    assert values(chain(a, axis("c", [0.5]))) == [{"a": 1}, {"a": 2}, {"c": 0.5}]
    assert type(values(a)[0]["a"]) is int  # NumPy's numbers become Python's


def test_names_are_short_and_differ():
    grid = product(
        axis("config.flow.kinds", {"4:1": ("channels",)}), axis("guidance", [0.5, 2.0]),
        axis("config.train.seed", [1]), axis("seed", [2]),
    )  # fmt: skip
    first, second = Sweep(grid, ("bpd",)).points
    assert first.name == "000,kinds=4%3A1,guidance=0.5,train.seed=1,seed=2"
    assert first.run_name == second.run_name == "kinds=4%3A1,train.seed=1"
    long = [sweeps.Point(0, {"x": sweeps.Choice(0, "y" * 500 + end)}, {"x": "x"}) for end in "ab"]
    assert long[0].name != long[1].name and len(long[0].name) < 150
    tricky = chain(axis("a", {"1,b=2": 0}), product(axis("a", {"1": 1}), axis("b", {"2": 2})))
    first, second = Sweep(tricky, ("bpd",)).points
    assert first.name.partition(",")[2] != second.name.partition(",")[2]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_sweeps_can_run(path, tmp_path):
    sweep = sweeps.read(path)
    runner.Runner(sweep, Store(tmp_path)).check()
    assert len(sweep.points) >= 4 and len(sweep.title) > 20 and sweep.description


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: product(axis("a", [1]), axis("a", [2])), "the setting a is on two axes"),
        (lambda: together(axis("a", [1]), axis("b", [2, 3])), r"grids of \[1, 2\] points"),
        (lambda: axis("a", [3, 3.0]), "the axis a has a value twice"),
        (lambda: chain(axis("a", [1]), axis("a", [1])), "the points 0 and 1 are the same"),
        (lambda: chain(axis("a", [1]), axis("a", {"1": 2})), "the values 1 and 2 under the label"),
        (lambda: axis("config.optim.lr", [None]), "config.optim.lr is None"),
        (lambda: axis("a", []), "no points"),
    ],
)
def test_grids_that_cannot_be(make, message):
    with pytest.raises(UsageError, match=message):
        Sweep(make(), ("bpd",))


class Swept:
    """Sweeps a trained flow, by the command or the function."""

    def __init__(self, run, folder):
        self.path, self.run, self.workdir = folder / "sweep.py", run, folder / "swept"
        self.path.write_text(POINTS)

    def __call__(self, *more):
        given = {"sweep": self.path, "workdir": self.workdir, "run": self.run}
        return cli.main(["sweep", *(f"--{name}={value}" for name, value in given.items()), *more])

    def change(self, old, new):
        self.path.write_text(self.path.read_text().replace(old, new))

    def numbers(self):
        return [record["number"] for record in Store(self.workdir).records()]

    def table(self):
        return jetflow.report(self.workdir, "csv")


@pytest.fixture
def sweep(trained, tmp_path):
    return Swept(trained("tarflow"), tmp_path)


@pytest.fixture(scope="module")
def uninterrupted(trained, tmp_path_factory):
    """The same sweep, by the function, in one go; its model is loaded once."""
    swept = Swept(trained("tarflow"), tmp_path_factory.mktemp("sweep"))
    with pytest.MonkeyPatch.context() as patch:
        loads, load = [], runner.load_model
        patch.setattr(runner, "load_model", lambda *args: loads.append(args) or load(*args))
        records = jetflow.sweep(sweeps.read(swept.path), swept.workdir, run=swept.run)
    assert len(loads) == 1 and [record["status"] for record in records] == ["done"] * 4
    return swept


def test_a_sweep_measures_all_points(uninterrupted):
    rows = list(csv.DictReader(uninterrupted.table().splitlines()))
    settings = [(row["draws"], row["seed"]) for row in rows]
    assert settings == [("1", "3"), ("1", "4"), ("2", "3"), ("2", "4")]
    values = {float(row["noised_bpd"]) for row in rows}
    assert len(values) == 4 and all(1 < value < 10 for value in values)
    pictures = sorted(path.name for path in uninterrupted.workdir.glob("points/*.png"))
    assert pictures == [f"{i:03d},draws={1 + i // 2},seed={3 + i % 2}.png" for i in range(4)]
    page = html_page.read((uninterrupted.workdir / "report.html").read_text())
    assert "4 of 4 points measured" in page.text and page.tags["img"] == 4
    assert "155e0069c5c5089c" in page.text  # the data's checksum
    assert page.marked[0][1] == f"{min(values):.4g}"


def test_interrupted_and_failed_points_are_measured_again(
    sweep, uninterrupted, monkeypatch, capsys
):
    evaluate, seen = runner.evaluate, []

    def fail(model, options):
        seen.append((options.draws, options.seed))
        if len(seen) in (2, 4, 6):
            raise {2: KeyboardInterrupt, 4: UsageError, 6: RuntimeError}[len(seen)]("no luck")
        return evaluate(model, options)

    monkeypatch.setattr(runner, "evaluate", fail)
    assert sweep() == 130 and sweep.numbers() == [0]
    assert sweep() == 1
    assert seen == [(1, 3), (1, 4), (1, 4), (2, 3), (2, 4)]
    assert "failed: 1 of 4 points" in capsys.readouterr().err
    page = html_page.read((sweep.workdir / "report.html").read_text())
    assert "no luck" in page.text and "1 failed" in page.text
    assert sweep() == 1
    assert Store(sweep.workdir).records()[2]["error"] == "RuntimeError: no luck"
    assert sweep() == 0 and sweep() == 0
    assert len(seen) == 7 and sweep.table() == uninterrupted.table()


def test_shards_and_printed_commands_cover_the_sweep(sweep, uninterrupted, capsys):
    assert sweep("--shard=1/2", "--fix=temperature=1.0") == 0 and sweep.numbers() == [1, 3]
    capsys.readouterr()
    fix = ["--fix=mesh=data=64", "--fix=temperature=1.0"]  # for another machine
    assert sweep("--shard=0/2", "--print", *fix) == 0
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [command[:2] for command in commands] == [["jetflow", "sweep"]] * 2
    for command in commands:
        assert command.count(fix[0]) == 1
        assert cli.main([word for word in command[1:] if word != fix[0]]) == 0
    assert sweep.table() == uninterrupted.table()


def test_a_point_that_another_process_is_at_is_left_to_it(sweep, capsys):
    sweep.change("[1, 2]", "[1, None]")  # None is the default of an option
    (sweep.workdir / "locks").mkdir(parents=True)
    with filelock.FileLock(sweep.workdir / "locks" / "001,draws=1,seed=4"):
        assert sweep() == 0
    assert sweep.numbers() == [0, 2, 3]
    assert "other processes are at 1 points" in capsys.readouterr().err
    assert Store(sweep.workdir).records()[1]["results"][0]["draws"] == 2


def test_a_folder_holds_one_sweep(sweep, capsys):
    assert sweep("--point=0") == 0
    before = (sweep.workdir / "sweep.json").read_bytes()
    assert sweep("--fix=split=train") == 2
    assert "sweep.fixed.split is absent there and train here" in capsys.readouterr().err
    sweep.change("[3, 4]", "[4, 3]")
    assert sweep() == 2 and "its points are others" in capsys.readouterr().err
    assert (sweep.workdir / "sweep.json").read_bytes() == before
    sweep.change("[4, 3]", "[3, 4]")
    sweep.change("[1, 2]", "[1, 2, 3]")  # more points may come last
    assert sweep("--point=5") == 0 and sweep.numbers() == [0, 5]
    with pytest.raises(UsageError, match="was begun with --run"):
        jetflow.sweep(sweep.path, sweep.workdir)
    assert tiny_runs.train("tarflow", sweep.workdir, train__steps=1) == 2
    assert f"{sweep.workdir} holds a sweep" in capsys.readouterr().err
    with pytest.raises(UsageError, match="holds a run; give the sweep a --workdir of its own"):
        jetflow.sweep(sweep.path, sweep.run, run=sweep.run)


def test_all_points_measure_one_checkpoint(sweep, tmp_path, capsys):
    """Also where the run is trained on in between, and not where that one is gone."""
    sweep.run = shutil.copytree(sweep.run, tmp_path / "run")
    checkpoints = sweep.run / "checkpoints"
    shutil.move(checkpoints / "12", tmp_path / "12")
    assert sweep("--point=0") == 0
    shutil.move(tmp_path / "12", checkpoints / "12")
    assert sweep("--point=1") == 0
    assert [record["step"] for record in Store(sweep.workdir).records()] == [10, 10]
    shutil.rmtree(checkpoints / "10")
    assert sweep("--point=2") == 2
    assert "no checkpoint of step 10" in capsys.readouterr().err and sweep.numbers() == [0, 1]


def test_a_failure_ends_processes_that_are_joined(sweep, monkeypatch):
    """Others may wait for the one that failed; `hosts.joined` ends them."""
    measuring = runner.Runner(sweeps.read(sweep.path), Store(sweep.workdir), sweep.run)
    monkeypatch.setattr(measuring, "_measure", lambda _: [][0])
    monkeypatch.setattr(runner.hosts, "agreed", lambda value: value)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(IndexError):
        measuring.visit(sweeps.read(sweep.path).points[0])
    assert not sweep.numbers()


# Sweeps that train.


@pytest.fixture
def training(tmp_path):
    """The file of a sweep of two trainings of a tiny Jet, on other images, each measured twice."""
    fixed = {f"config.{name}": value for name, value in tiny_runs.FLOWS["jet"][1].items()}
    path = tmp_path / "sweep.py"
    path.write_text(
        '"""Two splits."""\n\nfrom jetflow.sweeps import Sweep, axis, product\n\n\n'
        "def get_sweep():\n"
        "    splits = {name: f'train[:{name}%]' for name in ('90', '50')}\n"
        "    grid = product(axis('config.data.train_split', splits), axis('seed', [0, 1]))\n"
        f"    config = '{tiny_runs.ROOT}/configs/photos_jet.py'\n"
        f"    return Sweep(grid, ('bpd',), config, fixed={fixed!r}, pictures=4)\n"
    )
    return path


def test_a_sweep_trains_each_run_once(training, tmp_path, capsys, compilation_cache):
    workdir = tmp_path / "swept"
    records = jetflow.sweep(training, workdir)
    assert sorted(run.name for run in (workdir / "runs").iterdir()) == [
        "train_split=50",
        "train_split=90",
    ]
    assert capsys.readouterr().err.count("done: step 12") == 2
    places = ["runs/train_split=90"] * 2 + ["runs/train_split=50"] * 2
    assert [record["workdir"] for record in records] == places
    assert len({record["metrics"]["bpd"] for record in records}) == 4
    page = html_page.read((workdir / "report.html").read_text())
    assert "flow.num_couplings325" in page.text  # the field, its default, its value
    html_page.read(jetflow.report(workdir / "runs" / "train_split=90").read_text())


def test_without_the_network_nothing_is_trained(training, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "train", lambda *_, **__: pytest.fail("it trains"))
    training.write_text(training.read_text().replace("('bpd',)", "('bpd', 'fid')"))
    fix = {"inception_weights": str(tmp_path / "none.pth")}
    with pytest.raises(UsageError, match=r"none\.pth cannot be read"):
        jetflow.sweep(training, tmp_path / "swept", fix=fix)
    monkeypatch.setattr(runner.inception, "load", refuse)
    with pytest.raises(UsageError, match="give --fix inception_weights=PATH"):
        jetflow.sweep(training, tmp_path / "swept")


def refuse(_):
    raise UsageError("give --inception_weights PATH")


def test_a_failed_training_is_tried_once_a_call(training, tmp_path, monkeypatch):
    tried = []

    def diverge(config, workdir, **_):
        tried.append((workdir.name, config.data.train_split, config.train.steps))
        raise Diverged("it diverged")

    monkeypatch.setattr(runner, "train", diverge)
    for count in (1, 2):
        records = jetflow.sweep(training, tmp_path / "swept")
        runs = [(f"train_split={part}", f"train[:{part}%]", 12) for part in (90, 50)]
        assert tried == runs * count
    assert [record["error"] for record in records] == ["it diverged"] * 4
    recipe = (
        "from configs import photos_jet\n\n\ndef get_config():\n"
        "    config = photos_jet.get_config()\n    config.optim.b2 = 0.8\n    return config\n"
    )
    (tmp_path / "photos_jet.py").write_text(recipe)
    monkeypatch.chdir(tiny_runs.ROOT)
    training.write_text(re.sub(r"'\S+photos_jet.py'", "'photos_jet.py'", training.read_text()))
    with pytest.raises(UsageError, match=r"recipe.optim.b2 is 0.95 there and 0.8 here"):
        jetflow.sweep(training, tmp_path / "swept")


@pytest.mark.slow
def test_killed_and_started_again_it_ends_with_the_same_table(
    training, tmp_path, compilation_cache
):
    """A kill in the first training, and one between two points."""
    jetflow.sweep(training, tmp_path / "whole")
    killed, arguments = tmp_path / "killed", ["sweep", "--sweep", str(training), "--workdir"]
    for reached in ("runs/train_split=90/checkpoints/5", "points/000,train_split=90,seed=0.json"):
        process = tiny_runs.start([*arguments, str(killed)])
        while not (killed / reached).exists() and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    done = {record["name"]: record["seconds"] for record in Store(killed).records()}
    assert 0 < len(done) < 4
    after = {record["name"]: record["seconds"] for record in jetflow.sweep(training, killed)}
    assert done.items() <= after.items(), "a point was measured twice"
    assert jetflow.report(killed, "csv") == jetflow.report(tmp_path / "whole", "csv")
