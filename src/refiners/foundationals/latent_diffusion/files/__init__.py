"""Models in files: folders in diffusers' layout and our own, single files, the hub, and conversions between them."""
