"""The folder of a run: who may go on in it with which config; runs of version 0.1 are read."""

import contextlib
import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_runs

from jetflow import cli, hosts
from jetflow.fields import differences
from jetflow.types import UsageError
from jetflow.workdir import FORMAT, claimed, read_config

GOLDEN = Path(__file__).parent / "golden" / "workdirs"  # see the README beside it

CONFIG = json.loads((GOLDEN / "tar" / "config.json").read_text())
CONFIG["train"] |= {"steps": 0, "epochs": 2}
CONFIG["resolved"] |= {"total_steps": 20, "train_examples": 160, "train_checksum": "a"}


def changed(**values):
    """CONFIG with other values, as `train__log_every=1`."""
    config = copy.deepcopy(CONFIG)
    for name, value in values.items():
        section, _, field = name.partition("__")
        config[section][field] = value
    return config


def begin(workdir, config, **options):
    with claimed(workdir) as claim:
        claim.begin(config, **options)


@pytest.fixture
def run(tmp_path):
    """The folder of a run with CONFIG that has made a step."""
    begin(tmp_path / "run", CONFIG)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "bpd": 8.0}\n')
    return tmp_path / "run"


def test_cadences_mesh_and_workers_may_change(run):
    config = changed(train__log_every=1, train__keep_every=5, mesh__data=2, data__workers=4)
    begin(run, config)
    assert read_config(run) == json.loads(json.dumps(config))
    assert json.loads((run / "config.json").read_text())["format"] == FORMAT


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optim__lr": 0.2}, r"config.optim.lr is 0.002 there and 0.2 here; .*init_from"),
        ({"resolved__data_version": "1.0.1"}, "data_version is 1.0.0 there and 1.0.1 here; its da"),
        ({"resolved__train_examples": 161}, "train_examples is 160 there and 161 here; its data"),
        ({"resolved__train_checksum": "b"}, "train_checksum is a there and b here; its data"),
        ({"resolved__total_steps": 21}, "total_steps is 20 there and 21 here; its data"),
        ({"train__epochs": 3, "resolved__total_steps": 30},
         "epochs is 2 there and 3 here; .* --extend"),
    ],
)  # fmt: skip
def test_any_other_change_is_refused(run, values, message):
    with pytest.raises(UsageError, match=message):
        begin(run, changed(**values))
    assert read_config(run) == json.loads(json.dumps(CONFIG))


def test_a_run_that_is_extended_may_change_its_length_alone(run):
    length = {"train__epochs": 0, "train__steps": 30, "resolved__total_steps": 30}
    begin(run, changed(**length), extend=True)
    assert read_config(run)["train"]["steps"] == 30
    with pytest.raises(UsageError, match=r"config.optim.lr is 0.002 there"):
        begin(run, changed(optim__lr=0.2, **length), extend=True)
    with pytest.raises(UsageError, match=r"30 steps, and config\.train asks for 20"):
        begin(run, CONFIG, extend=True)


def test_a_run_without_steps_gives_way(run):
    (run / "metrics.jsonl").unlink()
    begin(run, changed(optim__lr=0.2))
    assert read_config(run)["optim"]["lr"] == 0.2


def test_one_trains_at_a_time_and_what_cannot_start_leaves_nothing(tmp_path):
    workdir = tmp_path / "a" / "b"
    with pytest.raises(RuntimeError), claimed(workdir):
        with pytest.raises(UsageError, match="another process trains in"), claimed(workdir):
            pass
        assert workdir.exists()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "sweep.json").touch()
    with pytest.raises(UsageError, match="holds a sweep"), claimed(tmp_path):
        pass


# Version 0.1


@pytest.fixture
def golden(tmp_path):
    return shutil.copytree(GOLDEN / "tar", tmp_path / "tar")


def test_runs_of_version_0_1_sample_and_evaluate_as_before(golden, tmp_path):
    npz = tmp_path / "tar.npz"
    flags = ["--num=8", "--seed=3", "--label=3", f"--npz={npz}", f"--out={tmp_path / 'tar.png'}"]
    assert cli.main(["sample", "--workdir", str(golden), *flags]) == 0
    with np.load(npz) as images, np.load(GOLDEN / "tar.npz") as expected:
        assert images["images"].std() > 30
        assert np.abs(images["images"].astype(int) - expected["images"]).max() <= 1
    shutil.rmtree(golden / "evals")
    assert cli.main(["evaluate", "--workdir", str(golden), "--metrics=bpd,noised_bpd"]) == 0
    for metric, value in {"bpd": 8.5783, "noised_bpd": 8.5922}.items():
        result = json.loads((golden / "evals" / f"{metric}-00000060.json").read_text())
        assert result["value"] == pytest.approx(value, abs=1e-4)


def test_a_restart_goes_on_from_what_its_predecessor_saved_last(tmp_path, monkeypatch, capsys):
    """The folder is read once it is locked; and version 0.1 trained this one to its end."""
    workdir, locked = tmp_path / "run", hosts.locked

    @contextlib.contextmanager
    def released_late(path, *, wait):
        shutil.copytree(GOLDEN / "tar", workdir, dirs_exist_ok=True)
        with locked(path, wait=wait) as mine:
            yield mine

    monkeypatch.setattr(hosts, "locked", released_late)
    command = ["train", "--config", str(tiny_runs.ROOT / "configs" / "digits_tarflow.py")]
    fields = {"flow.num_blocks": 2, "flow.width": 64, "optim.lr": 2e-3, "train.steps": 60}
    fields["eval.samples"] = 10
    command += [f"--config.{name}={value}" for name, value in fields.items()]
    assert cli.main([*command, "--workdir", str(workdir)]) == 2
    assert "config.eval.samples is 80 there and 10 here" in capsys.readouterr().err
    assert cli.main([*command[:-1], "--workdir", str(workdir)]) == 0
    assert "all 60 steps were done before" in capsys.readouterr().err


@pytest.mark.parametrize("prefix", ["config.", "sweep.recipe."])
def test_fields_that_came_later_are_as_by_default(prefix):
    old = {"flow": {"kind": "jet", "width": 8}}
    for precision, differing in (("default", set()), ("highest", {f"{prefix}flow.precision"})):
        new = {"flow": {**old["flow"], "attention": "auto", "precision": precision}}
        assert set(differences(old, new, prefix=prefix)) == differing
