"""Decoding by contrast: two next-token distributions -> one; one file per method."""
