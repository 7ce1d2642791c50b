"""A cache lies on disk as a manifest, shards, stores, checksums, leases, atomic commits."""
