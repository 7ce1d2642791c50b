"""A cache is read as a PyTorch dataset, for people who keep their own trainer: pictures and targets
are joined by key.

    data = Dataset("train/", "caches/clip-b16-1a2b3c4d", levels=[12])
    for epoch in range(10):
        data.set_epoch(epoch)                                   # the stored views take turns
        for batch in DataLoader(data, 256, shuffle=True, num_workers=8, persistent_workers=True):
            loss = ...(batch["pixels"], batch["features"])

`examples/plain_pytorch.py` is a whole training loop. B batch, L levels, T stored tokens, P patches,
D width, S pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featcache import rng
from featcache.catalog import extract_command
from featcache.errors import UsageError, UserError, counted
from featcache.pictures.open_source import open_source
from featcache.pictures.source import PictureError, Source
from featcache.reading import content_match, join, pixel_check, transform_probe
from featcache.reading.cache import Cache
from featcache.reading.feature_reader import FeatureReader
from featcache.reading.sample_check import PictureCheck
from featcache.reading.tensors import to_tensor
from featcache.views import pixel_path
from featcache.views.draw import DrawnViews, stored_view
from featcache.views.policy import policy_from_dict
from featcache.views.render import render

Sample = dict[str, Any]
_ADVICE = pixel_check.training_advice("pixel_tolerance=LEVELS")


class Dataset(torch.utils.data.Dataset[Sample]):
    """Gives one sample a picture, map-style: the view of the current epoch and what is stored of
    it.

    `pictures` is a folder, a tar pattern or a `featcache.pictures.source.Source`; None takes the
    pixels that the cache stores (`--pixels raw`), and nothing is decoded. Quarantined pictures are
    skipped, pictures the cache does not know are refused. A sample holds

        pixels   (3, S, S) uint8, geometry as stored; `transform` is applied to it, and may change
                 colours only: with `check_transform` it is tried on pictures of our own as the
                 dataset is made, and refused where it moves pixels, though it be now and then
        FIELDS   each of `fields` as a tensor; of `features` only `levels` (block numbers) and the
                 first `tokens`
        key, view, row, index     the picture's key, the view shown, the row in the cache, the
                                  number in this dataset

    `decode=True` gives features as float32 in image order, (L, 1 + P, D). Of ranked tokens some may
    not be stored (`--keep`) or not read (`tokens`): those are NaN, so that a loss which looks at
    them cannot go unnoticed. Leave them out with `known = features.isfinite().all(-1)`, a mask (B,
    L, 1 + P). Of raster tokens the first `tokens` come.

    `decode=False` gives them as stored, in the codec's arrays and half the bytes to carry from
    workers, (L, T, D) with `mask_order` beside ranked ones; `data.decode(batch)` does the rest
    where the batch is, on a GPU too.

    A share `check_pixels` of the views is compared with what the teacher saw. Before that, with
    `check_sample`, at most 256 pictures of all shards are, as the dataset is made: `checked` says
    how many. `skipped` pictures are in the cache's quarantine, and `left_out` rows of the cache
    have no picture here.

    `match="content"` finds pictures that were renamed or moved by the bytes of their files, each of
    which is read once by `workers` threads as the dataset is made.

    Works with num_workers=0 and with forked and spawned workers; a whole batch is one `cache.read`.
    `set_epoch` reaches persistent workers too: call it before the epoch's iteration begins.
    """

    def __init__(
        self,
        pictures: str | os.PathLike[str] | Source | None,
        cache: str | os.PathLike[str] | Cache,
        *,
        fields: Sequence[str] = ("features",),
        levels: Sequence[int] | None = None,
        tokens: int | None = None,
        epoch: int = 0,
        decode: bool = True,
        transform: Callable[[Tensor], Any] | None = None,
        return_key: bool = True,
        check_pixels: float = 1 / 16,
        pixel_tolerance: float = 0.0,
        check_sample: bool = True,
        check_transform: bool = True,
        match: Literal["key", "content"] = "key",
        workers: int = 2,
    ) -> None:
        _check_shares(check_pixels, pixel_tolerance)
        self.cache = cache if isinstance(cache, Cache) else Cache(cache)
        if not self.cache.complete:
            raise UserError(
                f"cache {str(self.cache.path)!r} is incomplete ({len(self.cache.records)} of "
                f"{counted(len(self.cache.manifest['shards']), 'shard')}); finish it with: "
                f"{extract_command.for_cache(self.cache.manifest, self.cache.path)}"
            )
        self.source = _open(pictures, self.cache)
        left_out = 0  # that cannot be decoded, and are found by no content
        if match not in ("key", "content"):
            raise UsageError(f"match {match!r}: 'key' or 'content' is allowed")
        if match == "content" and not isinstance(self.source, join.StoredPixels):
            self.source = content_match.rename(self.cache, self.source, workers)
            left_out = len(self.source.left_out)
        self.pictures, self.rows, self.skipped = join.join_by_key(self.cache, self.source)
        self.skipped += left_out
        self.left_out, _ = join.left_out(self.cache, self.rows)
        self.policy = policy_from_dict(self.cache.identity["policy"])
        self.fields, self.levels, self.tokens = tuple(fields), levels, tokens
        if transform is not None and check_transform:
            transform_probe.check_transform(transform, self.policy.size)
        self.decoded, self.transform, self.return_key = decode, transform, return_key
        self.check_pixels, self.pixel_tolerance = check_pixels, pixel_tolerance
        self._digests = rng.key_digests(self.source.keys[i] for i in self.pictures)
        # workers see what `set_epoch` writes
        self._epoch = torch.tensor([_checked_epoch(epoch)]).share_memory_()
        self._readers = {
            name: FeatureReader(self.cache, name.rpartition("/")[0] or None, levels=levels)
            for name in self.fields
            if name.rpartition("/")[2] == "features"
        }
        self._read_fields = tuple(dict.fromkeys([*self._stored(), *self._pixel_fields()]))
        # a name that is not stored is refused now
        self.cache.read(np.zeros(0, np.int64), 0, self._read_fields, levels, tokens)
        self.checked = self._check_sample() if check_sample and check_pixels else 0

    def _check_sample(self) -> int:
        """Compare pictures of all shards with the cache; returns how many."""
        if isinstance(self.source, join.StoredPixels):
            return 0
        facts = (self.cache, self.source, self.pictures, self.rows)
        check = PictureCheck(*facts, self.pixel_tolerance, _ADVICE)
        sample = check.sample(seed=0)
        check.check_pixels(sample, seed=0)
        return len(sample)

    def _stored(self) -> list[str]:
        """Arrays that the fields are made of: features of a codec may be several, ranked ones need
        their order."""
        return [
            *self.fields,
            *(field for reader in self._readers.values() for field in reader.fields),
        ]

    def _pixel_fields(self) -> tuple[str, ...]:
        return ("pixels",) if isinstance(self.source, join.StoredPixels) else DrawnViews._fields

    @property
    def epoch(self) -> int:
        return int(self._epoch[0])

    def set_epoch(self, epoch: int) -> None:
        """Show the views of this epoch from the next iteration on; over V epochs every picture
        shows its V views."""
        self._epoch[0] = _checked_epoch(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([range(len(self))[index]])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """Return the samples of a batch, with one read of the cache; PyTorch's loader asks for
        batches in this way."""
        at = np.asarray(indices, np.int64)
        rows, digests = self.rows[at], self._digests[at]
        views = stored_view(digests, self.epoch, self.cache.views)
        host = self.cache.read(rows, views, self._read_fields, self.levels, self.tokens)
        pixels = [self._pixels(host, i, int(index)) for i, index in enumerate(at)]
        for i in np.flatnonzero(
            pixel_check.sample_views(digests, views, self.epoch, 0, self.check_pixels)
        ).tolist():
            where = (int(rows[i]), int(views[i]), pixels[i])
            pixel_check.check_pixels(self.cache, *where, self.pixel_tolerance, _ADVICE)
        arrays = self._tensors({name: to_tensor(host[name]) for name in self._stored()})
        return [
            {
                "pixels": self._image(pixels[i]),
                **{name: values[i] for name, values in arrays.items()},
                **({"key": self.source.keys[self.pictures[index]]} if self.return_key else {}),
                **{"view": int(views[i]), "row": int(rows[i]), "index": int(index)},
            }
            for i, index in enumerate(at)
        ]

    def decode(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Give a batch of `decode=False` float32 features (B, L, 1 + P, D) in image order, on the
        batch's device."""
        out = dict(batch)
        for name, reader in self._readers.items():
            out[name] = reader.features(batch)
        return out

    def _tensors(self, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the arrays that a sample keeps of those that were read."""
        if not self.decoded:
            return arrays
        whole = self.decode(arrays)
        return {name: whole[name] for name in self.fields}

    def _pixels(
        self, host: Mapping[str, npt.NDArray[Any]], i: int, index: int
    ) -> npt.NDArray[np.uint8]:
        if "pixels" in host:
            stored: npt.NDArray[np.uint8] = host["pixels"][i]
            return stored
        number = int(self.pictures[index])
        try:
            picture = pixel_path.decode_picture(self.source, number)
        except (PictureError, OSError) as error:
            key = self.source.keys[number]
            raise UserError(
                f"picture {key!r} cannot be used in training: {error}; fix it, or remove it"
            ) from error
        drawn = (host["crop"][i], host["flip"][i], host["jitter"][i])
        return render(picture, *drawn, self.policy.size, self.policy.filter)

    def _image(self, pixels: npt.NDArray[np.uint8]) -> Any:
        image = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
        return image if self.transform is None else self.transform(image)


def _checked_epoch(epoch: int) -> int:
    if not isinstance(epoch, int) or epoch < 0:
        raise UsageError(f"Dataset: epoch {epoch!r}; a whole number from 0 on is needed")
    return epoch


def _check_shares(check_pixels: float, pixel_tolerance: float) -> None:
    """Refuse shares out of range, NaN among them: it compares with nothing and would switch the
    check off without a word."""
    for name, value, most in (
        ("check_pixels", check_pixels, 1.0),
        ("pixel_tolerance", pixel_tolerance, 255.0),
    ):
        if not isinstance(value, int | float) or not 0 <= value <= most:
            raise UsageError(f"Dataset: {name}={value!r}; a number from 0 to {most:g} is allowed")


def _open(pictures: str | os.PathLike[str] | Source | None, cache: Cache) -> Source:
    if isinstance(pictures, str | os.PathLike):
        return pixel_path.match_decoder(open_source(pictures), cache.identity["pixel_path"])
    if pictures is not None:
        return pictures
    if not join.stores_pixels(cache):
        raise UserError(
            f"cache {str(cache.path)!r} stores no pixels: give the pictures it was made from "
            f"({cache.manifest['provenance']['source']!r}), or extract with --pixels raw"
        )
    return join.StoredPixels(cache)
