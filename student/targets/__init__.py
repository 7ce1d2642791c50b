"""A step learns from targets that are read from a cache, computed online, or kept in memory."""
