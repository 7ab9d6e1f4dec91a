<<<<<<< HEAD
"""Image folders: examples, buckets, cached latents and text features."""
=======
"""Training data: folder -> examples -> buckets -> cached latents and text features -> batches."""
>>>>>>> data
