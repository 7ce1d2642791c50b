"""Encoders, decoders and losses that recipes are made of."""
