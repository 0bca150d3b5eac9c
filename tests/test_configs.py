"""Every config that ships builds its run, and configs/base.py states every field."""

import jax
import pytest
import tiny_runs

from jetflow import configs
from jetflow.tools.plan import roofline
from jetflow.training.experiment import set_up
from jetflow.types import UsageError

CONFIGS = tiny_runs.ROOT / "configs"
ARGUMENTS = {
    "afhq256_tarflow": ("", ":smoke"),
    "imagenet128_tarflow": ("", ":smoke"),
    "imagenet21k_jet": ("", ":32", ":smoke", ":32,smoke"),
    "imagenet_itarflow": ("", ":128", ":256", ":smoke", ":128,smoke"),
    "imagenet32_jet": ("", ":32x2", ":smoke"),
    "imagenet64_jet": ("", ":64x5", ":smoke"),
    "imagenet64_tarflow": ("", ":unconditional", ":conditional", ":conditional,smoke"),
    "photos_jet": ("", ":8", ":32"),
    "photos_tarflow": ("", ":8", ":32"),
    "transfer_cifar10_jet": ("", ":smoke"),
    "transfer_imagenet64_jet": ("", ":smoke"),
    "transfer_photos": (":pretrain", ":finetune", ":scratch"),
}
NAMES = sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem != "base")


@pytest.mark.parametrize("name", NAMES)
def test_config_builds(name):
    path = CONFIGS / f"{name}.py"
    assert len(path.read_text().split('"""')[1]) > 40  # a docstring, with the expected result
    for argument in ARGUMENTS.get(name, ("",)):
        config = configs.read(f"{path}{argument}")
        run = set_up(config, roofline.load, jax.devices())  # so that it need not fit here
        assert run.total_steps > 0
        assert run.trainer.flow.image_shape == run.train_data.image_shape
        if argument and name.startswith("photos"):
            assert config.data.name == f"photos/{argument[1:]}"


def test_a_published_float32_likelihood_has_the_precision_of_float32():
    for aim, expected in (("likelihood", ("float32", "highest")),
                          ("conditional", ("bfloat16", "default"))):  # fmt: skip
        flow = configs.read(f"{CONFIGS}/imagenet64_tarflow.py:{aim}").flow
        assert (flow.dtype, flow.precision) == expected


@pytest.mark.parametrize("argument", [":64", ":smoke,64x5x2", ":64x5,32x2"])
def test_unknown_arguments_are_refused(argument):
    with pytest.raises(UsageError, match="expected one of 32x2, 64x5, smoke, or CHOICE,smoke"):
        configs.read(f"{CONFIGS}/imagenet64_jet.py{argument}")


def test_fields_take_values_and_texts_alike():
    """What a sweep gives, and what a command line does."""
    for values in (
        {"optim.lr": 1, "flow.kinds": ["spatial"], "noise.flip": True, "init_from": "a"},
        {"optim.lr": "1", "flow.kinds": "('spatial',)", "noise.flip": "true", "init_from": "a"},
    ):
        config = configs.read(f"{CONFIGS}/photos_jet.py")
        for name, value in values.items():
            configs.change(config, name, value)
        assert config.optim.lr == 1.0 and isinstance(config.optim.lr, float)
        assert config.flow.kinds == ("spatial",)
        assert config.noise.flip is True and config.init_from == "a"
    with pytest.raises(UsageError, match=r"config.train.steps is 1.5; expected a whole number"):
        configs.change(config, "train.steps", 1.5)
