"""Frozen features of a trained student or a teacher, and the labels they are judged by."""
