"""Closed pydantic models of settings, one file per job."""
