"""Pure functions over adapter files: from AdapterFile to AdapterFile, or to a report."""
