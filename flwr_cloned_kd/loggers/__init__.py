"""Callbacks that show a run: in the terminal, and in the tools that people keep runs in."""
