"""What a run needs on TPUs and what it costs there, by its compiled programs."""
