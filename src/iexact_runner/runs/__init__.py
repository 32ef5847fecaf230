"""Runs and sweeps on disk: what they write, lock, read back and go on from."""
