"""What a training is: its state, step and loop."""
