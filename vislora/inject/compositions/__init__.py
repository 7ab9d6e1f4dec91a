"""The compositions, one file each; see `vislora.inject.composition` for what they are."""
