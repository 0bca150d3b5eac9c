"""`sample_accuracy`: the flow's own likelihoods tell the labels of its samples."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs

from jetflow import bits_per_dim, cli, load_model, sample
from jetflow.evals.evaluation import evaluate
from jetflow.evals.settings import EvaluateOptions
from jetflow.noise import Noise, Purpose, key_for
from jetflow.types import Guidance, UsageError


def test_samples_are_told_by_the_labels_they_were_drawn_with(trained):
    """Against the likelihoods of the same samples, one label after another."""
    workdir = trained("tarflow")
    arguments = ["--workdir", str(workdir), "--num_samples=23", "--batch_size=8", "--draws=1"]
    command = ["evaluate", "--metrics=sample_accuracy", *arguments, "--guidance=4", "--seed=5"]
    assert cli.main(command) == 0
    names = [path.name for path in workdir.glob("evals/sample_accuracy-*seed=5.json")]
    assert names == ["sample_accuracy-00000012-draws=1,guidance=4.0,num_samples=23,seed=5.json"]
    result = json.loads((workdir / "evals" / names[0]).read_text())

    model = load_model(workdir)
    label = np.arange(23, dtype=np.int32) % 10
    images = sample(
        model.flow, model.variables, key_for(5, 0, Purpose.SAMPLE), num=23, label=label,
        guidance=Guidance(4.0), noise="gaussian",
    )  # fmt: skip
    key, noise = key_for(5, 0, Purpose.EVALUATE), Noise("gaussian", 0.1)
    flow, variables, images = model.flow, model.variables, jnp.asarray(images)
    bits = [
        bits_per_dim(flow, variables, images, jnp.full(23, y), key, noise=noise) for y in range(10)
    ]
    right = int((np.argmin(np.stack(bits), axis=0) == label).sum())
    assert result["value"] == right / 23
    assert 0 < right < 23
    assert result["samples"]["guidance"] == 4.0 and result["standard_error"] > 0


def test_samples_of_a_file_are_told(trained, tmp_path):
    """As those that are drawn; a file of other labels is refused."""
    model, npz = load_model(trained("tarflow")), tmp_path / "samples.npz"
    fields = {"metrics": ("sample_accuracy",), "draws": 1, "batch_size": 8}
    drawn = evaluate(model, EvaluateOptions(num_samples=23, guidance=4.0, **fields))
    draw = ["sample", "--workdir", model.workdir, "--num", 23, "--batch_size", 8, "--guidance", 4]
    draw += ["--out", tmp_path / "a.png", "--npz", npz]
    assert cli.main([str(word) for word in draw]) == 0
    given = evaluate(model, EvaluateOptions(samples=npz, **fields))
    assert given[0]["value"] == drawn[0]["value"]
    assert given[0]["samples"]["images"] == 23 and "checksum" in given[0]["samples"]
    np.savez(npz, images=np.zeros((23, 8, 8, 1), np.uint8), labels=np.zeros(23, np.int32))
    with pytest.raises(UsageError, match="its labels are not 0 to 9 in turn"):
        evaluate(model, EvaluateOptions(samples=npz, **fields))


def test_labels_are_needed(trained):
    model = load_model(trained("volume preserving"))
    for metric in ("accuracy", "sample_accuracy"):
        with pytest.raises(UsageError, match=f"{metric} is for flows with labels"):
            evaluate(model, EvaluateOptions(metrics=(metric,)))


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_digits_are_told_by_their_likelihoods(tmp_path):
    """By a shorter training than the README's classifier has, whose accuracy is 0.970."""
    workdir = tmp_path / "digits"
    config = tiny_runs.ROOT / "configs" / "digits_tarflow.py"
    command = ["train", "--config", str(config), "--workdir", str(workdir)]
    fields = {"batch_size": 64, "steps": 600, "eval_every": 0, "sample_every": 0}
    command += [f"--config.train.{name}={value}" for name, value in fields.items()]
    assert cli.main(command) == 0
    assert cli.main(["evaluate", "--metrics=accuracy", "--workdir", str(workdir)]) == 0
    result = json.loads((workdir / "evals" / "accuracy-00000600.json").read_text())
    assert result["noise"] == {"kind": "gaussian", "std": 0.1}
    assert result["data"]["examples"] == 297
    assert result["value"] > 0.9
