"""`python -m featcache` is the `featcache` command."""

from featcache.cli import main

main()
