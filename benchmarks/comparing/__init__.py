"""Two commits against each other: a worker process each, rounds in turn."""
