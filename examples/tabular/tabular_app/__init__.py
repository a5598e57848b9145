"""Cloned knowledge distillation on a table."""
