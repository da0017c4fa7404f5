"""The built-in trainer: arcface_torch's config files, heads and loaders, on CPU or GPU, without a checkout."""
