"""A cache on disk: manifest, shards, stores, checksums, leases, atomic commits."""
