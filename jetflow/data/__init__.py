"""Data sets by name, and the batches of them that training and evaluation read."""
