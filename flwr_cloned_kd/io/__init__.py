"""Checked reading of what edges send and of what is on disk."""
