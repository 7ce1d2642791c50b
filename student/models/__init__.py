"""Recipes are made of these encoders, decoders and losses."""
