"""Results folders of runs, read and compared afterwards."""
