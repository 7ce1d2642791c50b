"""Each file is one command of `student`: its options, and what it says. The work is done
elsewhere."""
