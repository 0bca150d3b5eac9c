"""What a run needs on TPUs or NVIDIA GPUs and what it costs there, by its compiled programs."""
