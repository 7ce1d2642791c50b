"""What a step learns from: read from a cache, computed online, or kept in memory."""
