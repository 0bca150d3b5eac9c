"""A sweep's points, measured one after another."""
