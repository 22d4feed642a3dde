"""Merging: several weighted LoRA adapters -> one; one file per method."""
