"""Train the ViT that names the thing in a picture. `python -m imagemesh_training.train_vit --work DIR`.

It sees only renders of the emoji under the augmentation of `augment.training_picture`: never a generated picture, so
that it can judge those. A ViT as in Dosovitskiy et al. (2021), 8-pixel patches, label smoothing 0.1.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from imagemesh_training import augment, data
from imagemesh_training.common import Ema, Progress, Run, arguments, autocast, set_lr


def new_vit() -> ViTForImageClassification:
    """An untrained ViT of 2.8M parameters with a label for every thing."""
    names = [thing.name for thing in data.things()]
    config = ViTConfig(
        image_size=data.PICTURE,
        patch_size=8,
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    return ViTForImageClassification(config)


def known(folder: Path) -> ViTForImageClassification:
    """The ViT in this folder; where it names other things than are drawn now, with a head for those, by their names."""
    vit = ViTForImageClassification.from_pretrained(folder).float()
    fresh = new_vit()
    if vit.config.id2label == fresh.config.id2label:
        return vit
    fresh.vit.load_state_dict(vit.vit.state_dict())
    old, new = vit.config.label2id, fresh.config.label2id
    here, there = zip(*((new[name], old[name]) for name in new if name in old), strict=True)
    with torch.no_grad():
        fresh.classifier.weight[list(here)] = vit.classifier.weight[list(there)]
        fresh.classifier.bias[list(here)] = vit.classifier.bias[list(there)]
    return fresh


def processor() -> ViTImageProcessor:
    """What turns any picture into the input of the ViT."""
    size = {"height": data.PICTURE, "width": data.PICTURE}
    return ViTImageProcessor(size=size, resample=2, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def to_tensor(pictures: list[data.Pixels]) -> torch.Tensor:
    """uint8 pictures (64, 64, 3) -> float (n, 3, 64, 64) in -1..1, as the image processor makes them."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def mixed_loss(logits: torch.Tensor, labels: torch.Tensor, others: torch.Tensor, areas: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy, label smoothing 0.1, of logits (n, things) where `areas` (n,) of each shows `others` (n,)."""
    own = functional.cross_entropy(logits, labels, label_smoothing=0.1, reduction="none")
    pasted = functional.cross_entropy(logits, others, label_smoothing=0.1, reduction="none")
    return (own * (1 - areas) + pasted * areas).mean()


@torch.no_grad()
def accuracy(vit: ViTForImageClassification, sprites: data.Sprites, rounds: int = 4, seed: int = 1) -> float:
    """Top-1 on scenes of every thing under augmentation that training never uses."""
    rng = np.random.default_rng(seed)
    labels = np.tile(np.arange(len(sprites)), rounds)
    pictures = []
    for thing in labels:
        scene = data.random_scene(rng)
        scene = data.Scene(int(thing), scene.colour, scene.size, scene.place)
        pictures.append(augment.unseen(data.draw(scene, sprites, rng), rng))
    guesses = torch.cat([vit(part).logits.argmax(-1) for part in torch.split(to_tensor(pictures), 128)])
    return float((guesses.numpy() == labels).mean())


def export(run: Run, sprites: data.Sprites, folder: Path) -> None:
    """Write the averaged weights and the processor, and print the accuracy."""
    vit = run.ema.module
    assert isinstance(vit, ViTForImageClassification)
    vit.save_pretrained(folder)
    processor().save_pretrained(folder)
    print(f"step {run.step}: top-1 under unseen augmentation {accuracy(vit, sprites):.3f}", flush=True)


def train(args: argparse.Namespace) -> None:
    """Run the training from wherever its checkpoint left it."""
    torch.manual_seed(args.seed)
    sprites = data.load_sprites(args.work / "cache")
    vit = known(args.init) if args.init else new_vit()
    optimizer = torch.optim.AdamW(vit.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.02)
    run = Run(vit, optimizer, Ema(vit, 0.998), np.random.default_rng(args.seed), args.work / "vit.pt")
    run.resume()
    progress = Progress(args.steps)
    vit.train()
    while run.going(args.steps):
        set_lr(optimizer, run.step, args.steps, args.lr, warmup=200)
        labels = run.rng.integers(len(sprites), size=args.batch)
        pictures = [augment.training_picture(int(thing), sprites, run.rng) for thing in labels]
        pictures, others, areas = augment.cut_mix(pictures, labels, run.rng)
        with autocast():
            logits = vit(to_tensor(pictures)).logits.float()
        target = torch.from_numpy(labels)
        loss = mixed_loss(logits, target, torch.from_numpy(others), torch.from_numpy(areas))
        run.learn(loss)
        progress.add(run.step, loss=loss.item(), top1=float((logits.argmax(-1) == target).float().mean()))
        run.save_if_due(args.save_minutes)
        if run.step % args.export_every == 0:
            export(run, sprites, args.work / "vit")
    run.save()
    export(run, sprites, args.work / "vit")


def main(argv: list[str] | None = None) -> None:
    """Read the flags and train."""
    parser = arguments("Train the ViT", steps=3000, lr=1e-3, batch=48)
    parser.add_argument("--init", type=Path, help="transformers folder to start from")
    parser.add_argument("--export-every", type=int, default=1000)
    train(parser.parse_args(argv))


if __name__ == "__main__":
    main()
