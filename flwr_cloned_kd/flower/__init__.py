"""Cloned KD for Flower: the strategies, the client and the client mods."""
