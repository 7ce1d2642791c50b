"""CAE equals a second implementation of its text; its alignment target, sizes, cost and refusals
are checked."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from featcache.errors import UsageError, UserError
from student import config, recipes
from student.recipes import cae
from student.targets.cached import _check_token_ids
from student.training import optim
from tests import student_fixtures as fx
from tests.student.models.test_beit import reference_block, reference_encode
from tests.student.models.test_latent_regressor import reference_regress
from tests.student.models.test_vit import Weights, layer_norm, linear
from tests.student.recipes.test_caev2 import chosen
from tests.student.recipes.test_mae import parts_of
from tests.student.recipes.test_recipes import (
    check_against,
    first_losses,
    gmac,
    parameters,
    reference_losses,
    tiny_batch,
    tiny_model,
    wave,
)


def reference_latents(w: Weights, batch: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Run the encoder on CLS and patches `ids`, through the projection where there is one, CLS left
    out."""
    x = reference_encode(parts_of(w, "encoder"), batch["images"], ids)
    if "encoder_to_regresser.weight" in w:
        x = linear(x, w, "encoder_to_regresser")
        x = layer_norm(
            x, w["encoder_to_regresser_norm.weight"], w["encoder_to_regresser_norm.bias"]
        )
    return x[:, 1:]


def reference_prediction(
    w: Weights, batch: dict[str, Tensor], decoder_depth: int = 2
) -> tuple[Tensor, Tensor]:
    """Compute the latents of the masked patches and what the decoder makes of them."""
    table = w["rd_pos_embed"].expand(2, -1, -1)
    pos_x, pos_visible = (chosen(table, batch[name]) for name in ("ids_masked", "ids_keep"))
    visible = reference_latents(w, batch, batch["ids_keep"])
    z = reference_regress(
        parts_of(w, "regresser"), w["mask_token"].expand_as(pos_x), visible, pos_x, pos_visible
    )
    z = layer_norm(z, w["regresser.norm.weight"], w["regresser.norm.bias"])
    x = z + pos_x if decoder_depth else z
    own = parts_of(w, "decoder")
    for i in range(decoder_depth):
        x = reference_block(x, own, f"decoder_blocks.{i}", 2)
    if decoder_depth:
        x = layer_norm(x, own["norm.weight"], own["norm.bias"])
    return z, linear(x, own, "head")


def reference_align(w: Weights, batch: dict[str, Tensor], z: Tensor, constants: Weights) -> Tensor:
    """Compute the squared distance of the latents from those of `constants`, the same weights out
    of reach of the gradient."""
    return ((z - reference_latents(constants, batch, batch["ids_masked"])) ** 2).mean()


def reference_parts(
    w: Weights, batch: dict[str, Tensor], constants: Weights, decoder_depth: int = 2
) -> tuple[Tensor, Tensor]:
    """Compute cross-entropy of the hidden tokens, and the alignment."""
    z, logits = reference_prediction(w, batch, decoder_depth)
    nats = []
    for b, ids in enumerate(batch["ids_masked"].tolist()):
        for m, i in enumerate(ids):
            row = logits[b, m]
            nats.append(
                (row - row.max()).exp().sum().log() + row.max() - row[batch["token_ids"][b, i]]
            )
    return torch.stack(nats).sum() / len(nats), reference_align(w, batch, z, constants)


@pytest.mark.parametrize(
    ("settings", "weight", "depth"),
    [([], 2.0, 2), (["regressor_width=8"], 2.0, 2), (["align_weight=0"], 0.0, 2),
     (["align_weight=0", "decoder_depth=0"], 0.0, 0), (["align_weight=0.5"], 0.5, 2)],
)  # fmt: skip
def test_loss_and_gradients_equal_the_second_implementation(
    settings: list[str], weight: float, depth: int
) -> None:
    model, _ = tiny_model("cae", *settings)
    batch = tiny_batch()
    constants = {name: x.clone() for name, x in model.state_dict().items()}
    out = model(batch)

    def reference(w: dict[str, Tensor]) -> Tensor:
        token, align = reference_parts(w, batch, constants, depth)
        return token + weight * align

    check_against(model, out["loss"], reference)
    token, align = reference_parts(constants, batch, constants, depth)
    torch.testing.assert_close(out["token"], token)
    assert ("align" in out) == (weight > 0)
    if weight:
        torch.testing.assert_close(out["align"], align)


def test_alignment_target_is_detached_and_of_the_masked_patches() -> None:
    """It is of the same weights: gradients reach neither encoder nor projection through it, and
    hidden pixels change it."""
    model, _ = tiny_model("cae", "regressor_width=8")
    assert isinstance(model, cae.Model)
    batch = tiny_batch()
    target = model._alignment_target(batch["images"], batch["ids_masked"])
    assert not target.requires_grad
    assert target.shape == (2, 12, 8)
    expected = reference_latents(model.state_dict(), batch, batch["ids_masked"])
    torch.testing.assert_close(target, expected)
    before = model(batch)
    row, col = divmod(int(batch["ids_masked"][0, 0]), 4)
    batch["images"][0, :, 4 * row : 4 * row + 4, 4 * col : 4 * col + 4] += 1
    after = model(batch)
    assert not torch.equal(before["align"], after["align"])
    assert torch.equal(before["token"], after["token"])  # the visible path never sees them


def test_drop_path_of_the_target() -> None:
    """On as released, with draws of its own; off on request, and the encoder is left in training
    mode."""
    batch = tiny_batch()

    def two(setting: str) -> list[Tensor]:
        model, _ = tiny_model("cae", "drop_path=0.5", setting)
        assert isinstance(model, cae.Model)
        model.train()
        found = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            found.append(model._alignment_target(batch["images"], batch["ids_masked"]))
        assert model.encoder.training
        return found

    assert not torch.equal(*two("align_drop_path=true"))
    assert torch.equal(*two("align_drop_path=false"))


def test_parts_by_hand() -> None:
    """A head of zeros gives every token the same chance: log 9, and the argmax is token 0
    everywhere."""
    model, _ = tiny_model("cae")
    batch = tiny_batch()
    with torch.no_grad():
        for name in ("decoder.head.weight", "decoder.head.bias"):
            model.get_parameter(name).zero_()
    out = model(batch)
    assert out["token"].item() == pytest.approx(math.log(9))
    hidden = [
        int(batch["token_ids"][b, i])
        for b, ids in enumerate(batch["ids_masked"].tolist())
        for i in ids
    ]
    assert out["accuracy"].item() == pytest.approx(hidden.count(0) / 24)


def test_gradcheck_of_the_decoder() -> None:
    given = config.from_overrides(
        cae.Config,
        [
            "regressor_width=4",
            "regressor_heads=2",
            "decoder_depth=1",
            "vocabulary=3",
            "drop_path=0",
        ],
    )
    decoder = cae.Decoder(given).double()
    inputs = wave(1, 2, 4, phase=0.1).requires_grad_(), wave(1, 2, 4, phase=0.9).requires_grad_()
    assert torch.autograd.gradcheck(decoder, inputs)


def test_names_are_those_of_the_released_code() -> None:
    model, _ = tiny_model("cae", "regressor_width=8")
    tops = {name.split(".")[0] for name in model.state_dict()}
    bridge = {"encoder_to_regresser", "encoder_to_regresser_norm"}
    assert tops == {"encoder", "rd_pos_embed", "mask_token", "regresser", "decoder"} | bridge
    inner = {name for name in model.state_dict() if name.startswith("decoder.decoder_blocks.0.")}
    parts = ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "attn.q_bias",
             "attn.v_bias", "gamma_1", "attn.qkv.weight", "attn.proj.weight", "attn.proj.bias",
             "gamma_2", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight",
             "mlp.fc2.bias")  # fmt: skip
    assert inner == {f"decoder.decoder_blocks.0.{part}" for part in parts}


def test_first_losses() -> None:
    """The target moves with the weights, and no gradient goes through it."""

    def reference(w: dict[str, Tensor]) -> Tensor:
        token, align = reference_parts(w, tiny_batch(), {name: x.detach() for name, x in w.items()})
        return token + 2 * align

    assert first_losses("cae") == pytest.approx(reference_losses("cae", reference), rel=1e-8)


@pytest.mark.slow
def test_sizes() -> None:
    """Worked out by hand, parts as in CAE v2's test.

    base    encoder 85,807,872; regressor 4 * 7,091,712 + norm 1,536 = 28,368,384; mask token 768;
            positions 151,296; decoder 4 * 7,088,640 + 1,536 + 768 * 8,192 + 8,192 = 34,655,744
    tiny    bridge 192 * 768 + 768 + 1,536 = 149,760; small 384 * 768 + 768 + 1,536 = 297,216
    large   encoder 303,326,208; bridge 1,024 * 768 + 768 + 1,536 = 788,736; the rest as base:
            63,176,192
    """
    assert parameters("cae") == (148_984_064, 148_984_064 - 2 * 151_296)
    assert parameters("cae", "encoder=tiny")[0] == 5_526_720 + 149_760 + 63_176_192
    assert parameters("cae", "encoder=small")[0] == 21_670_272 + 297_216 + 63_176_192
    assert parameters("cae", "encoder=large")[0] == 303_326_208 + 788_736 + 63_176_192
    without = 148_984_064 - 4 * 7_088_640 - 1_536
    assert parameters("cae", "decoder_depth=0")[0] == without


@pytest.mark.slow
def test_cost() -> None:
    """55.0 GMAC: three times the forward pass without the alignment, whose 8.6 have no backward
    pass; within 2 %."""
    alone = gmac("cae", "align_weight=0")
    align = gmac("cae") - alone
    assert align == pytest.approx(8.6, rel=0.02)
    assert 3 * alone + align == pytest.approx(55.0, rel=0.02)


def test_settings_and_needs() -> None:
    given = cae.Config()
    assert given.patches - given.visible == 98
    assert optim.peak_lr(given, 64) == optim.peak_lr(given, 2048) == 1.5e-3
    assert cae.needs(given) == recipes.TargetSpec(
        teacher="clip-b16",
        levels=(),
        fields=("dvae/token_ids",),
        patches=196,
        scale=(0.08, 1.0),
        vocabulary=8192,
    )


def test_a_token_beyond_the_vocabulary_is_refused() -> None:
    ids = torch.tensor([[3, 16]], dtype=torch.uint16).numpy()
    _check_token_ids(ids, 17)
    with pytest.raises(
        UserError, match=r"cannot predict token id 16 of the cache: vocabulary=16; .* vocabulary=N"
    ):
        _check_token_ids(ids, 16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["mask_ratio=0"], "leaves all 196 patches visible"),
        (["decoder_depth=-1"], "decoder_depth=-1; allowed: 0 or more"),
        (
            ["align_weight=0", "align_drop_path=false"],
            "align_drop_path=false does nothing with align_weight=0",
        ),
        (["token_field=tokens"], "cannot read token_field='tokens'; allowed: NAME/token_ids"),
        (["regressor_heads=7"], "cannot build the regressor: width 768, 7 heads"),
        (["regressor_depth=0"], "regressor_depth: given 0"),
        (["vocabulary=0"], "vocabulary: given 0"),
        (["family=beit"], "unknown family 'beit'"),
        (["target=clip"], "unknown target 'clip': known: f, pixels, tokens, z"),
        (["norm_pix=false"], "norm_pix=false does nothing with target=tokens"),
    ],
)
def test_what_is_refused(settings: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config.from_overrides(cae.Config, settings)


def test_the_command_that_makes_the_tokens(tmp_path: Any) -> None:
    """With a cache of features: they are added to it. Without one: one command makes both."""
    import shlex

    from student.setup.missing import missing
    from student.setup.remedy import extract_remedy

    given = cae.Config()
    with fx.open_cache() as cache:
        added = shlex.split(extract_remedy(cae.needs(given), given, cache))
        assert "--add" in added
        assert added[added.index("--teacher") + 1] == "dvae"
        assert added[-2:] == ["--out", str(cache.path)]
        assert missing(cache, cae.needs(given), given) == [
            f"field dvae/token_ids is missing, it has {', '.join(cache.fields)}"
        ]
    both = shlex.split(extract_remedy(cae.needs(given), given, None))
    assert [both[i + 1] for i, word in enumerate(both) if word == "--teacher"] == [
        "clip-b16",
        "dvae",
    ]
    assert both[both.index("--scale") + 1] == "0.08,1"
