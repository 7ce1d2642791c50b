"""A trained student or a teacher gives frozen features; labels judge them."""
