"""Teachers as PyTorch modules: the contract, weights, precision, position embeddings."""
