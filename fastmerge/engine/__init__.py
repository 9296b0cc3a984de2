"""Runs plans: read, compute and hand over, one bounded-memory pass over the inputs."""
