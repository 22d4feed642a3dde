"""Where the passes of a model over rows are run: one file an executor."""
