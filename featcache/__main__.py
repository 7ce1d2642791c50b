"""`featcache` and `python -m featcache` start here: imports come under a guard, so that an early
Ctrl-C is one line."""

from featcache.errors import STOPPED
from featcache.runtime import signals, streams


def main() -> None:
    """Import the command line and run it."""
    streams.prepare()
    with signals.guard_imports(STOPPED):
        from featcache.cli import main as run
    run()


if __name__ == "__main__":
    main()
