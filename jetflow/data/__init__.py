"""Data sets by name, and the batches of them that training and evaluation read."""

from jetflow.data.pipeline import Dataset, eval_batches, load, train_batches

__all__ = ["Dataset", "eval_batches", "load", "train_batches"]
