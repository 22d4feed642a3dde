"""Orderers of exemplars, one file each: which labelled shots stand in a prompt, and in what order."""
