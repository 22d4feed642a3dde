"""Routers and what experts made of a suite: observing, training, evaluating and calibrating."""
