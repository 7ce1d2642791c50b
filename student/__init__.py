"""student: light trainers for masked image modelling from a featcache cache, one recipe a file."""
