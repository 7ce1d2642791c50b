"""Train a small ViT on a feature cache in a loop of one's own: it learns a teacher's last block,
token by token.

    featcache extract --teacher clip-b16 --images train/ --views 4 --levels last:1 --out cache
    python examples/plain_pytorch.py train/ cache

Nothing here but PyTorch, timm and `featcache.torch.Dataset`: pictures and features come joined by
key, and every epoch shows another of the stored views. Of a cache made with --keep the patches that
were not stored are NaN, and are left out of the loss. Prints the mean loss of each epoch.
"""

import sys

import timm
import torch
from torch.nn.functional import smooth_l1_loss
from torch.utils.data import DataLoader

from featcache import UserError
from featcache.torch import Dataset


def train(
    pictures: str | None, cache: str, epochs: int = 10, batch_size: int = 64, workers: int = 2
) -> list[float]:
    """Train, and return the mean loss of each epoch. `pictures` None takes the pixels that the
    cache stores."""
    data = Dataset(pictures, cache)
    loader = DataLoader(
        data, batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )
    size, teacher = data.policy.size, data.cache.identity["teacher"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    patch = size // int(teacher["patches"] ** 0.5)  # the student's tokens lie on the teacher's grid
    student = timm.create_model(
        "vit_tiny_patch16_224", img_size=size, patch_size=patch, num_classes=0
    ).to(device)
    head = torch.nn.Linear(student.embed_dim, teacher["width"]).to(device)
    optimizer = torch.optim.AdamW([*student.parameters(), *head.parameters()], lr=5e-4)
    means = []
    for epoch in range(epochs):
        data.set_epoch(epoch)
        losses = []
        for batch in loader:
            images = batch["pixels"].to(device, non_blocking=True) / 127.5 - 1  # (B, 3, S, S)
            # (B, 1 + P, D) of the last level
            targets = batch["features"][:, -1].to(device, non_blocking=True)
            # (B, 1 + P): all of them, but for a cache made with --keep
            known = targets.isfinite().all(-1)
            loss = smooth_l1_loss(head(student.forward_features(images))[known], targets[known])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        means.append(float(torch.stack(losses).mean()))
        print(f"epoch {epoch}: loss {means[-1]:.4f}")
    return means


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"two arguments are needed, PICTURES and CACHE:\n\n{__doc__}")
    try:
        train(*sys.argv[1:3])
    except UserError as error:  # one line, as the commands print it
        sys.exit(f"error: {error}")
