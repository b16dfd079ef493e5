"""LightningModules: causal language models, loaded from a directory or trained on the spot."""
