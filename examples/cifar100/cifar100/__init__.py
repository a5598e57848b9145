"""Cloned knowledge distillation on CIFAR-100."""
