"""Views: literal draws, the law's limits, and rendering against torchvision's own functions on PIL
pictures."""

from __future__ import annotations

import hashlib
import json
import math
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import functional as tv
from torchvision.transforms.transforms import RandomResizedCrop

from featcache import rng
from featcache.errors import UsageError, UserError
from featcache.views import draw, fingerprint
from featcache.views.policy import Policy, load_policy, policy_from_dict
from featcache.views.render import render, render_centre
from tests.conftest import waves

GOLDEN = Path(__file__).parents[2] / "golden"
CASES = json.loads((GOLDEN / "views.json").read_text())
# The fourth jitter number, as the manifest's readers must know it.
ORDERS = [
    "brightness,contrast,saturation",
    "brightness,saturation,contrast",
    "contrast,brightness,saturation",
    "contrast,saturation,brightness",
    "saturation,brightness,contrast",
    "saturation,contrast,brightness",
]
ZERO_HASH = 2283521107298152996  # of twelve zero bytes, by hashlib
STILL = (1.0, 1.0, 1.0, 0.0)


def draw_key(
    key: str, height: int, width: int, count: int = 1, **policy: object
) -> draw.DrawnViews:
    return draw.draw_views(
        load_policy(**policy), rng.key_digests([key]), np.array([[height, width]]), range(count)
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["key"])
def test_literal_views(case: dict) -> None:
    drawn = draw_key(case["key"], case["height"], case["width"], case["views"], **case["policy"])
    for view, expected in enumerate(case["drawn"]):
        assert drawn.crop[0, view].tolist() == expected["crop"]
        assert drawn.flip[0, view] == expected["flip"]
        assert drawn.area[0, view] == pytest.approx(expected["area"], rel=1e-6)
        np.testing.assert_allclose(drawn.jitter[0, view, :3], expected["jitter"][:3], rtol=1e-6)
        assert ORDERS[int(drawn.jitter[0, view, 3])] == expected["jitter"][3]


def test_golden_file_is_what_its_script_says() -> None:
    script = runpy.run_path(str(GOLDEN / "make_views.py"))
    for case in CASES:
        assert [script["one_view"](case, view) for view in range(case["views"])] == case["drawn"]


def test_dtypes_and_shapes() -> None:
    sizes = np.array([[40, 50], [60, 30], [9, 9]])
    drawn = draw.draw_views(Policy(), rng.key_digests("abc"), sizes, range(2))
    assert [(a.shape, a.dtype.str) for a in drawn] == [
        ((3, 2, 4), "<i4"),
        ((3, 2), "|u1"),
        ((3, 2), "<f4"),
        ((3, 2, 4), "<f4"),
    ]


@given(
    height=st.integers(1, 900),
    width=st.integers(1, 900),
    key=st.text(max_size=8),
    seed=st.integers(0, 2**63 - 1),
    low=st.floats(0.01, 1),
    span=st.floats(0, 1),
)
def test_boxes_lie_inside_the_picture_and_keep_the_limits(
    height: int, width: int, key: str, seed: int, low: float, span: float
) -> None:
    scale = (low, low + (1 - low) * span)
    drawn = draw_key(key, height, width, 5, scale=scale, seed=seed)
    for (top, left, h, w), area in zip(drawn.crop[0].tolist(), drawn.area[0].tolist(), strict=True):
        assert 0 <= top <= top + h <= height
        assert 0 <= left <= left + w <= width
        assert h >= 1
        assert w >= 1
        fallback = area == np.float32(h * w / (height * width)) and not scale[0] <= area <= scale[1]
        if not fallback:
            assert scale[0] * (1 - 1e-6) <= area <= scale[1] * (1 + 1e-6)
            # half a pixel of rounding on either side
            assert (
                (w - 0.5) * (h - 0.5)
                <= area * height * width * (1 + 1e-6)
                <= (w + 0.5) * (h + 0.5) * (1 + 1e-6)
            )
        assert (w - 0.5) / (h + 0.5) <= 4 / 3 * (1 + 1e-9)
        assert (w + 0.5) / max(h - 0.5, 1e-9) >= 3 / 4 * (1 - 1e-9)


@given(n=st.integers(1, 6), at=st.integers(0, 5), view=st.integers(0, 40))
def test_a_draw_depends_on_its_own_key_size_and_view_alone(n: int, at: int, view: int) -> None:
    at %= n
    keys, sizes = [f"p{i}" for i in range(n)], np.array([[30 + i, 50 - i] for i in range(n)])
    policy = Policy(jitter=0.3, seed=5)
    many = draw.draw_views(policy, rng.key_digests(keys), sizes, [7, view, 3])
    one = draw.draw_views(policy, rng.key_digests(keys[at : at + 1]), sizes[at : at + 1], [view])
    for together, alone in zip(many, one, strict=True):
        np.testing.assert_array_equal(together[at, 1], alone[0, 0])


def test_law_of_area_flip_and_position() -> None:
    """4,000 keys: areas average as torchvision's, flips are fair, positions even, and the seed
    matters."""
    digests = rng.key_digests(f"{i}" for i in range(4000))
    drawn = draw.draw_views(Policy(), digests, np.full((4000, 2), 300), [0])
    torchvision = _torchvision_areas(4000)
    assert drawn.area.mean() == pytest.approx(torchvision.mean(), abs=4 * 0.23 * (2 / 4000) ** 0.5)
    assert drawn.flip.mean() == pytest.approx(0.5, abs=4 * 0.5 / 4000**0.5)
    room = 300 - drawn.crop[:, 0, 2]
    share = (drawn.crop[:, 0, 0] + 0.5) / (room + 1)
    assert share.mean() == pytest.approx(0.5, abs=4 * 0.29 / 4000**0.5)
    other = draw.draw_views(Policy(seed=1), digests, np.full((4000, 2), 300), [0])
    assert (other.crop != drawn.crop).any(-1).mean() > 0.99


def _torchvision_areas(n: int) -> np.ndarray:
    picture = torch.zeros(3, 300, 300)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        boxes = [
            RandomResizedCrop.get_params(picture, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(n)
        ]
    return np.array([h * w / 90000 for _, _, h, w in boxes])


@pytest.mark.parametrize(("height", "width"), [(10, 400), (400, 10), (1, 500), (500, 1), (33, 100)])
def test_fallback_box_is_torchvisions(height: int, width: int) -> None:
    """torchvision draws nothing more where no try can fit: its answer is the rule."""
    expected = RandomResizedCrop.get_params(
        torch.zeros(1, height, width), [0.99, 1.0], [3 / 4, 4 / 3]
    )
    drawn = draw_key("long", height, width, scale=(0.99, 1.0))
    assert tuple(drawn.crop[0, 0].tolist()) == expected
    assert drawn.area[0, 0] == np.float32(expected[2] * expected[3] / (height * width))


def test_flip_limits() -> None:
    assert not draw_key("f", 40, 40, 50, flip=0.0).flip.any()
    assert draw_key("f", 40, 40, 50, flip=1.0).flip.all()


def test_jitter_stays_in_its_range_and_uses_every_order() -> None:
    drawn = draw_key("j", 40, 40, 600, jitter=0.4)
    factors = drawn.jitter[0, :, :3]
    assert factors.min() >= np.float32(0.6)
    assert factors.max() <= np.float32(1.4)
    assert factors.min() < 0.61
    assert factors.max() > 1.39
    assert sorted(set(drawn.jitter[0, :, 3].tolist())) == [0, 1, 2, 3, 4, 5]


def test_jitter_changes_no_box_and_no_flip() -> None:
    """A jittered policy's boxes are the plain one's: the words of a view have fixed places."""
    plain, jittered = draw_key("same", 80, 90, 20), draw_key("same", 80, 90, 20, jitter=0.4)
    np.testing.assert_array_equal(plain.crop, jittered.crop)
    np.testing.assert_array_equal(plain.flip, jittered.flip)
    np.testing.assert_array_equal(plain.jitter, np.tile(np.float32(STILL), (1, 20, 1)))


MODES = {
    "bicubic": tv.InterpolationMode.BICUBIC,
    "bilinear": tv.InterpolationMode.BILINEAR,
    "lanczos": tv.InterpolationMode.LANCZOS,
}


@pytest.mark.parametrize("name", sorted(MODES))
@pytest.mark.parametrize("size", [16, 64, 112])
def test_render_is_torchvisions_resized_crop(name: str, size: int) -> None:
    picture = Image.fromarray(waves(75, 90))
    for crop in [(0, 0, 75, 90), (13, 21, 40, 33), (70, 85, 5, 5), (3, 4, 1, 1)]:
        expected = np.asarray(tv.resized_crop(picture, *crop, [size, size], MODES[name]))
        np.testing.assert_array_equal(render(picture, crop, 0, STILL, size, name), expected)
        flipped = render(picture, crop, 1, STILL, size, name)
        np.testing.assert_array_equal(flipped, expected[:, ::-1])


def test_render_crops_before_it_resizes() -> None:
    """Pillow's resize(box=...) looks beyond the box's edge and gives other pixels."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    ours = render(picture, (10, 12, 20, 24), 0, STILL, 56, "bicubic").astype(int)
    other = np.asarray(
        picture.resize((56, 56), Image.Resampling.BICUBIC, box=(12, 10, 36, 30))
    ).astype(int)
    assert np.abs(ours - other).max() > 0


@pytest.mark.parametrize("order", range(6))
def test_jitter_acts_on_the_whole_picture_in_the_stored_order(order: int) -> None:
    picture = Image.fromarray(waves(60, 80, 1.0))
    factors = {"brightness": 1.3, "contrast": 0.65, "saturation": 1.35}
    adjust = {
        "brightness": tv.adjust_brightness,
        "contrast": tv.adjust_contrast,
        "saturation": tv.adjust_saturation,
    }
    expected = picture
    for name in ORDERS[order].split(","):
        expected = adjust[name](expected, float(np.float32(factors[name])))
    expected = tv.resized_crop(expected, 5, 9, 30, 40, [32, 32], tv.InterpolationMode.BICUBIC)
    jitter = np.float32([*factors.values(), order])
    np.testing.assert_array_equal(
        render(picture, (5, 9, 30, 40), 0, jitter, 32, "bicubic"), np.asarray(expected)
    )


@pytest.mark.parametrize("size", [196, 224, 112])
def test_one_view_at_several_sizes_is_a_direct_crop_each_time(size: int) -> None:
    picture = Image.fromarray(waves(150, 210, 2.0))
    direct = picture.crop((31, 17, 31 + 120, 17 + 100)).resize(
        (size, size), Image.Resampling.BICUBIC
    )
    np.testing.assert_array_equal(
        render(picture, (17, 31, 100, 120), 0, STILL, size, "bicubic"), direct
    )


@pytest.mark.parametrize(
    ("height", "width"), [(50, 80), (80, 50), (64, 64), (20, 30), (53, 79), (101, 64)]
)
def test_centre_is_torchvisions_resize_and_central_crop(height: int, width: int) -> None:
    picture = Image.fromarray(waves(height, width))
    resized = tv.resize(picture, round(32 / 0.875), tv.InterpolationMode.BICUBIC)
    expected = np.asarray(tv.center_crop(resized, [32, 32]))
    np.testing.assert_array_equal(render_centre(picture, 32, 0.875, "bicubic"), expected)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (20, 300)])
def test_clamped_draw_is_one_try_with_its_sides_cut(height: int, width: int) -> None:
    """The sampler of MAE's linear probe, in scalar Python from the picture's words."""
    policy = Policy(scale=(0.08, 1.0), seed=3)
    digests = rng.key_digests([f"k{i}" for i in range(200)])
    drawn = draw.draw_views(policy, digests, np.full((200, 2), (height, width)), [6], clamp=True)
    raw = rng.words(digests, rng.stream("view", 3), 4, view=6)
    cut = 0
    for i, row in enumerate(raw):
        area, ratio, top, left = ((int(word) >> 11) / 2**53 for word in row)
        target = (0.08 + 0.92 * area) * (height * width)
        aspect = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * ratio)
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        cut += w > width or h > height
        w, h = min(w, width), min(h, height)
        assert drawn.crop[i, 0].tolist() == [
            int(top * (height - h + 1)),
            int(left * (width - w + 1)),
            h,
            w,
        ]
        assert drawn.area[i, 0] == np.float32(h * w / (height * width))
    assert cut > 20


def test_literal_pixel_hash() -> None:
    """BLAKE2b-64 of the C-order bytes, little-endian."""
    pixels = waves(28, 28)
    expected = int.from_bytes(hashlib.blake2b(pixels.tobytes(), digest_size=8).digest(), "little")
    assert fingerprint.pixel_hash(pixels) == expected
    assert fingerprint.pixel_hash(np.zeros((2, 2, 3), np.uint8)) == ZERO_HASH
    # a mirrored view is another one, whatever its strides
    assert fingerprint.pixel_hash(pixels[:, ::-1]) != expected
    assert fingerprint.pixel_hash(pixels[:, ::-1]) == fingerprint.pixel_hash(pixels[:, ::-1].copy())


@pytest.mark.parametrize("size", [14, 28, 32, 100, 224, 9])
def test_thumbnail_is_the_rounded_mean_of_each_block(size: int) -> None:
    pixels = np.random.default_rng(size).integers(0, 256, (size, size, 3), np.uint8)
    thumbnail = fingerprint.thumbnail(pixels)
    assert thumbnail.shape == (14, 14, 3)
    assert thumbnail.dtype == np.uint8
    for y in range(14):
        for x in range(14):
            rows = slice(y * size // 14, -(-(y + 1) * size // 14))
            columns = slice(x * size // 14, -(-(x + 1) * size // 14))
            mean = pixels[rows, columns].reshape(-1, 3).astype(np.float64).mean(0)
            np.testing.assert_array_equal(thumbnail[y, x], np.floor(mean + 0.5))


def test_the_papers_policies() -> None:
    """METHODS 1.6, 3.6, 4.6, 7.6."""
    expected = {
        "default": ((0.2, 1.0), "bicubic", 0.0),
        "cae": ((0.08, 1.0), "bicubic", 0.0),
        "caev2": ((0.4, 1.0), "bicubic", 0.4),
        "fd": ((0.08, 1.0), "bilinear", 0.0),
    }
    for name, (scale, filter_name, jitter) in expected.items():
        policy = load_policy(name)
        assert (policy.scale, policy.filter, policy.jitter) == (scale, filter_name, jitter)
        assert (policy.size, policy.ratio, policy.flip, policy.seed) == (
            224,
            (3 / 4, 4 / 3),
            0.5,
            0,
        )


def test_policy_round_trips_through_json(tmp_path: Path) -> None:
    policy = load_policy("caev2", size=64, seed=2**62)
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(policy.as_dict()))
    assert load_policy(str(file)) == policy
    assert policy_from_dict(json.loads(file.read_text())) == policy
    file.write_text('{"scale": [0.5, 1]}')
    assert load_policy(str(file), size=32) == Policy(size=32, scale=(0.5, 1))


BAD = [
    ({"size": 0}, "size 0"),
    ({"size": 5000}, "size 5000"),
    ({"size": 22.5}, "size"),
    ({"size": True}, "size"),
    ({"scale": (0, 1)}, "scale 0,1"),
    ({"scale": (0.5, 0.2)}, "scale 0.5,0.2"),
    ({"scale": (0.5, 1.2)}, "scale 0.5,1.2"),
    ({"scale": 0.5}, "scale"),
    ({"scale": (0.1, 0.2, 0.3)}, "scale"),
    ({"scale": ("a", 1)}, "scale"),
    ({"scale": (float("nan"), 1.0)}, "scale"),
    ({"ratio": (0, 1)}, "ratio"),
    ({"ratio": (2, 1)}, "ratio"),
    ({"ratio": (1.0, float("inf"))}, "ratio"),
    ({"filter": "nearest"}, "bicubic"),
    ({"filter": 3}, "filter"),
    ({"flip": 1.5}, "flip 1.5"),
    ({"flip": float("nan")}, "flip"),
    ({"jitter": 1.0}, "jitter 1"),
    ({"jitter": -0.1}, "jitter -0.1"),
    ({"seed": -1}, "seed -1"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"sclae": (0.5, 1)}, "did you mean scale"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=lambda value: str(value)[:40])
def test_impossible_policies_are_usage_errors(fields: dict, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_policy(**fields)
    assert message in str(caught.value)


def test_unknown_policy_offers_near_names() -> None:
    with pytest.raises(UsageError, match="did you mean caev2"):
        load_policy("cae2")


@pytest.mark.parametrize("text", ["", "[1, 2]", "{", '"size"', "null", "3"])
def test_bad_policy_files_are_one_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "mine.json"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_policy(str(file))
    assert "mine.json" in str(caught.value)
    with pytest.raises(UserError, match=r"absent\.json"):
        load_policy(str(tmp_path / "absent.json"))
