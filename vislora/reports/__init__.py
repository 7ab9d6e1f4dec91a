"""Contact sheets and pages."""
