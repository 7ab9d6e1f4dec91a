"""Adapter algorithms: one file each, the whole of its mathematics. Knows no model family, no file, no loop."""
