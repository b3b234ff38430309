"""Which samples make up each global batch: pure integers, no I/O, no clock, no global state."""
