"""A federation in virtual time, for tests and studies."""
