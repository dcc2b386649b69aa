"""Pictures and captions, cached as latents and text embeddings, in batches that are looked up by place."""
