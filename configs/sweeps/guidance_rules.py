"""Rules of guidance by strength, on the conditional TarFlow on digits, with the same prior noise.

Also with the block alone guided that is decoded first. The sample_accuracy is how often the flow's
own likelihoods tell the label with which a sample was drawn; the distances are of few samples, so
too large: they compare with each other alone.
"""

from jetflow.sweeps import Sweep, axis, product


def get_sweep():
    return Sweep(
        product(
            axis("guide_blocks", [0, 1]),
            axis("guide_rule", ["log_scale", "scale", "starflow"]),
            axis("guidance", [1.0, 2.0, 4.0]),
        ),
        metrics=("fid", "sample_accuracy"),
        config="../digits_tarflow.py",
        fixed={"num_samples": 200, "denoise": True},
    )
