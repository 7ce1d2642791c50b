"""A process chooses its device, compiles its loops and handles signals before it works."""
