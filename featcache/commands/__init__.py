"""Each file holds one command of `featcache`: its options, and what it says. The work is done
elsewhere."""
