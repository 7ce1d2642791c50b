"""Pictures become views, views a teacher's targets, targets shards: the work behind `featcache
extract`."""
