"""Example datasets and example models."""
