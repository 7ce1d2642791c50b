#!/bin/sh
# This script made format3.tar.xz with the last version that wrote format 3, commit 217cf94:
#
#     cd /data/format3 && sh make_format3.sh    # in a folder with pictures/, and then
#     tar --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner -C /data -cJf format3.tar.xz format3
#
# pictures/: ten PNGs of every mode of tests/conftest.py's make_photos, and bad.png, which is none.
set -e
teacher=synthetic:levels=4,tokens=16,width=24,size=32
given="--teacher $teacher --images pictures --size 32 --views 2 --rows-per-shard 6"
featcache extract $given --levels 2,4 --out zarr
featcache extract $given --levels last:3 --add --out zarr
featcache extract $given --levels last:3 --views 3 --add --out zarr
featcache extract $given --levels last:3 --pixels raw --tokens ranked --keep 9 --out ranked
featcache convert zarr webdataset --store webdataset
cp -r zarr unfinished
rm -r unfinished/parts unfinished/shards/000001.*
