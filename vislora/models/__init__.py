"""Model families: one file each, and the embedded base."""

from vislora.models.base import EMBEDDED, load_family

__all__ = ["EMBEDDED", "load_family"]
