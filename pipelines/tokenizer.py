"""Train a small discrete tokenizer of the digits, for the recipe that predicts tokens (cae).

    python -m pipelines.digits OUT && python -m pipelines.tokenizer OUT

    OUT/tokenizer.safetensors, tokenizer.json   weights for `featcache extract --add --teacher
                                                SPEC`; its quality

It is DALL-E's discrete VAE (Ramesh et al. 2021, arXiv 2102.12092, section 2.1) at a size for two
cores: the encoder is the family `dvae` itself at 64 pixels, which makes a grid of 8 x 8 words as
the digits' teacher makes 8 x 8 patches. A decoder, which is not kept, rebuilds the picture from
words drawn by the Gumbel-softmax relaxation, whose temperature falls from 1 to 1/16. Ours: squared
error in place of the logit-Laplace likelihood, and in place of the KL term per patch the entropy of
the words' mean use, which keeps all of them in play at this size.

B batch, K words, G patches a side, S input pixels.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from featcache import rng
from featcache.console.command import Command
from featcache.console.entry import entry
from featcache.console.option import HelpGroup, option
from featcache.console.params import LocalPath
from featcache.console.text import echo
from featcache.errors import UserError
from featcache.pictures.decode import decode
from featcache.pictures.open_source import open_source
from featcache.pictures.source import Source
from featcache.teachers.dvae import Dvae
from featcache.views.draw import draw_views
from featcache.views.policy import Policy
from featcache.views.render import render, render_centre
from pipelines import small_teacher
from pipelines.digits import CROPS
from student.training.optim import warmup_cosine

SIZES = {"img_size": 64, "width": 16, "vocabulary": 64}
# The value of `featcache extract --add --teacher`, with --weights OUT/tokenizer.safetensors; its
# field of the cache.
SPEC = "dvae," + ",".join(f"{key}={value}" for key, value in SIZES.items())
FIELD = f"{SPEC}/token_ids"
COLDEST = 1 / 16
USE_WEIGHT = 0.01  # of the entropy of the words' mean use, in nats, beside the squared error


class Decoder(nn.Module):
    """Decodes soft words (B, K, G, G) to mapped grey pixels (B, 1, S, S)."""

    def __init__(self, vocabulary: int, width: int = 64, edge: int = 8) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(vocabulary, width, 1, bias=False),  # the codebook
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, edge**2, 1),
            nn.PixelShuffle(edge),
        )  # fmt: skip

    def forward(self, words: Tensor) -> Tensor:
        out: Tensor = self.layers(words)
        return out


def train(
    source: Source, *, seed: int, epochs: int, batch_size: int = 64, lr: float = 3e-3
) -> tuple[Dvae, Decoder]:
    """Train by Adam, one epoch of warm-up, half a cosine to 0, on a fresh view of every digit each
    epoch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2000 + seed)
        encoder, decoder = (
            Dvae("", SIZES["width"], SIZES["vocabulary"], SIZES["img_size"]),
            Decoder(SIZES["vocabulary"]),
        )
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    noise = torch.Generator().manual_seed(seed)
    pictures = [decode(source.read(row)) for row in range(len(source))]
    steps = math.ceil(len(source) / batch_size)
    for epoch in range(epochs):
        pixels = _views(pictures, source, seed, epoch)
        order = torch.from_numpy(rng.permutation(len(source), seed, epoch))
        total = 0.0
        for step, rows in enumerate(order.split(batch_size)):
            done = (epoch + step / steps) / epochs
            for group in optimizer.param_groups:
                group["lr"] = warmup_cosine(epoch + step / steps, total=epochs, warmup=1, peak=lr)
            error, use = losses(encoder, decoder, pixels[rows], COLDEST**done, noise)
            optimizer.zero_grad()
            (error - USE_WEIGHT * use).backward()
            optimizer.step()
            total += error.item()
        if epoch % 5 == 4 or epoch == epochs - 1:
            echo(f"tokenizer: epoch {epoch + 1} of {epochs}, squared error {total / steps:.4f}")
    return encoder.eval(), decoder.eval()


def losses(
    encoder: Dvae, decoder: Decoder, pixels: Tensor, temperature: float, noise: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return the squared error of the rebuilt pictures and the entropy (nats) of the words' mean
    use, of uint8 pixels (B, 3, S, S)."""
    mapped = 0.8 * (pixels.float() / 255) + 0.1
    logits = encoder.logits(mapped)  # (B, K, G, G)
    u = torch.rand(logits.shape, generator=noise).clamp_(1e-9, 1 - 1e-7)
    words = F.softmax((logits - torch.log(-torch.log(u))) / temperature, dim=1)
    use = F.softmax(logits, dim=1).mean((0, 2, 3))
    entropy = -(use * use.clamp_min(1e-9).log()).sum()
    return F.mse_loss(decoder(words), mapped[:, :1]), entropy


def _views(pictures: list[Image.Image], source: Source, seed: int, epoch: int) -> Tensor:
    """View number `epoch` of every picture as the tokenizer sees it, uint8 (n, 3, S, S)."""
    policy = Policy(**CROPS, seed=seed)
    sizes = np.array([(picture.height, picture.width) for picture in pictures])
    drawn = draw_views(policy, rng.key_digests(source.keys), sizes, views=[epoch])
    rendered = [
        render(
            picture,
            drawn.crop[i, 0],
            drawn.flip[i, 0],
            drawn.jitter[i, 0],
            SIZES["img_size"],
            "lanczos",
        )
        for i, picture in enumerate(pictures)
    ]
    return torch.from_numpy(np.stack(rendered)).permute(0, 3, 1, 2)


@torch.no_grad()
def quality(encoder: Dvae, decoder: Decoder, source: Source) -> dict[str, float]:
    """Measure on whole, uncropped digits: words in use, their perplexity, and the share of the
    pixels' variance that pictures rebuilt from the words alone explain."""
    size, k = SIZES["img_size"], SIZES["vocabulary"]
    whole = [
        render_centre(decode(source.read(row)), size, 1.0, "lanczos") for row in range(len(source))
    ]
    pixels = torch.from_numpy(np.stack(whole)).permute(0, 3, 1, 2)
    ids = encoder(pixels)  # (n, G * G)
    side = math.isqrt(ids.shape[1])
    rebuilt = decoder(F.one_hot(ids, k).float().transpose(1, 2).unflatten(2, (side, side)))
    target = 0.8 * (pixels[:, :1].float() / 255) + 0.1
    share = torch.bincount(ids.flatten(), minlength=k) / ids.numel()
    perplexity = torch.exp(-(share * share.clamp_min(1e-12).log()).sum())
    explained = 1 - F.mse_loss(rebuilt, target) / target.var(correction=0)
    used = int((share > 0).sum())
    return {
        "words": used,
        "perplexity": round(float(perplexity), 1),
        "explained": round(float(explained), 4),
    }


@click.command(
    cls=Command,
    epilog="Examples:\n"
    "  python -m pipelines.tokenizer digits\n"
    "  python -m pipelines.tokenizer digits --epochs 4",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.argument("out", type=LocalPath())
@option(
    "--seed",
    group=HelpGroup.TRAINING,
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Of the weights and the views.",
)
@option(
    "--epochs",
    group=HelpGroup.TRAINING,
    type=click.IntRange(2),
    default=10,
    show_default=True,
    help="Of the tokenizer's training.",
)
def cli(out: Path, seed: int, epochs: int) -> None:
    """Train OUT/tokenizer.safetensors on the digits in OUT/data, which `python -m pipelines.digits
    OUT` wrote.
    """
    if not any((out / "data").glob("train-*.tar")):
        raise UserError(
            f"no digits in {str(out / 'data')!r}: write them first with `python -m "
            f"pipelines.digits {out}`"
        )
    small_teacher.use_threads()
    started = time.perf_counter()
    source, test = (open_source(f"{out}/data/{part}-*.tar") for part in ("train", "test"))
    encoder, decoder = train(source, seed=seed, epochs=epochs)
    save_file(encoder.state_dict(), out / "tokenizer.safetensors")
    good = quality(encoder, decoder, test)
    seconds = round(time.perf_counter() - started, 1)
    facts = {"spec": SPEC, "seed": seed, "epochs": epochs, **good, "seconds": seconds}
    (out / "tokenizer.json").write_text(json.dumps(facts, indent=1) + "\n")
    echo(
        f"{good['words']} of {SIZES['vocabulary']} words in use on held-out digits (perplexity "
        f"{good['perplexity']}), which explain {100 * good['explained']:.1f} % of their pixels' "
        f"variance ({seconds} s): {out / 'tokenizer.safetensors'}"
    )


def main() -> None:
    entry(cli)


if __name__ == "__main__":
    main()
