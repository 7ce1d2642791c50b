"""Pack pictures: the command `featcache pack` under the name that scripts may still call.

python -m pipelines.pack_images SRC OUT --shard-size N
python -m pipelines.pack_images SRC OUT.beton
"""

from __future__ import annotations

from featcache.commands.pack import command
from featcache.console.entry import entry


def main() -> None:
    entry(command)


if __name__ == "__main__":
    main()
