"""Temperature of the prior against guidance, of a TarFlow without labels on photographs.

A flow without labels is guided away from itself with softened attention, at a temperature of 0.5 of
the attention logits.
"""

from jetflow.sweeps import Sweep, axis, product


def get_sweep():
    return Sweep(
        product(
            axis("temperature", [0.7, 0.8, 0.9, 1.0]),
            axis("guidance", [0.0, 0.5, 1.0, 2.0]),
        ),
        metrics=("fid",),
        config="../photos_tarflow.py:16",
        fixed={"attention_temperature": 0.5, "num_samples": 300},
    )
