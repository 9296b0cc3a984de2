"""Models: what is on disk, checked before a weight is read."""
