"""Cloned knowledge distillation on digits."""
