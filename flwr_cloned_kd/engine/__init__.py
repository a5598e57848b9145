"""Train and run clones: one loop for every phase, and the ways to run it fast."""
