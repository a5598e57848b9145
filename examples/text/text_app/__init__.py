"""Cloned knowledge distillation of a small language model."""
