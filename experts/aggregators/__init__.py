"""Aggregators: the replies of several experts -> one; one file each."""
