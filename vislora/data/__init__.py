"""Image folders: examples, buckets, cached latents and text features."""
