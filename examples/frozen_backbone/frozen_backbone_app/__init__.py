"""Cloned knowledge distillation of a head on a frozen backbone."""
