"""Where registries lie besides local folders: one kind of place a file. The seam is `registry/remote.py`."""
