"""Cloned knowledge distillation around a training loop of your own."""
