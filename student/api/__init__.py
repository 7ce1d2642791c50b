"""Python calls do what the commands do, by the same options as keywords."""
