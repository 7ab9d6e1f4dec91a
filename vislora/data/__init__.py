"""Training data: folder -> examples -> buckets -> cached latents and text features -> batches."""
