"""Checked reading of replies from edges and of files on disk."""
