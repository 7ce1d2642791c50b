"""Device choice, compiled loops and signals: what the process needs before it works."""
