"""This package runs teachers as PyTorch modules: contract, weights, precision, position
embeddings."""
