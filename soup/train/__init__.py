"""The training process: reads one run folder, builds, proves, trains and writes the result."""
