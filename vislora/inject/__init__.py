"""Puts adapters into any `nn.Module` and takes them out."""
