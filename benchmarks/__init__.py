"""Measurements, and what tests share with them."""
