"""Caches are found below `$FEATCACHE_HOME`: listed, and matched with the recipes they serve."""
