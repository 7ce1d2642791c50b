"""`student`, `python -m student` and `accelerate launch -m student` start here: imports come under
a guard, so that an early Ctrl-C or SIGTERM is one line."""

from featcache.errors import STOPPED
from featcache.runtime import signals, streams


def main() -> None:
    """Import the command line and run it."""
    streams.prepare()
    with signals.guard_imports(STOPPED):
        from student.cli import main as run
    run()


if __name__ == "__main__":
    main()
