"""Teach the text encoder to read captions, before the UNet meets it. `python -m imagemesh_training.train_text`.

From a random start the UNet would have to bind 175 names through noise; here the encoder learns first, in minutes, to
tell thing, colour, size and place apart. Every position from the end token on is asked: CLIP's attention is causal, so
those are the ones that have read the whole caption, and padding makes most of what cross-attention sees of them.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer

from imagemesh_training import data, tokenizer
from imagemesh_training.captions import caption
from imagemesh_training.common import Ema, Progress, Run, arguments, set_lr
from imagemesh_training.train_unet import WIDTH, new_text_encoder


class Reader(nn.Module):
    """The text encoder with one linear head a question; the heads are thrown away afterwards."""

    def __init__(self, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        answers = (len(data.things()), len(data.COLOURS), len(data.SIZES), len(data.PLACES))
        self.heads = nn.ModuleList(nn.Linear(WIDTH, count) for count in answers)

    def forward(self, ids: torch.Tensor, at: torch.Tensor) -> list[torch.Tensor]:
        """ids (n, 77), positions to ask `at` (n, k) -> logits (n, k, answers) of every question."""
        states = self.text_encoder(ids).last_hidden_state
        asked = states.gather(1, at[..., None].expand(-1, -1, WIDTH))
        return [head(asked) for head in self.heads]


def answers_of(scene: data.Scene) -> tuple[int, int, int, int]:
    """The right answers as indexes: thing, colour, size, place."""
    colours = list(data.COLOURS)
    return scene.thing, colours.index(scene.colour), data.SIZES.index(scene.size), data.PLACES.index(scene.place)


def positions(ids: torch.Tensor, end: int, rng: np.random.Generator, count: int = 4) -> torch.Tensor:
    """The end token's position of each row, then `count` random later ones: (n, count + 1)."""
    first = (ids == end).int().argmax(1).numpy()
    later = rng.integers(first[:, None], tokenizer.LENGTH, (len(ids), count))
    return torch.from_numpy(np.concatenate([first[:, None], later], axis=1))


def loss_of(
    model: Reader, words: CLIPTokenizer, scenes: list[data.Scene], rng: np.random.Generator
) -> tuple[torch.Tensor, list[float]]:
    """Cross-entropy summed over the questions, and the share of right answers to each."""
    texts = [caption(scene, rng) for scene in scenes]
    ids = words(texts, padding="max_length", max_length=tokenizer.LENGTH, return_tensors="pt").input_ids
    at = positions(ids, int(words.eos_token_id), rng)
    right = torch.tensor([answers_of(scene) for scene in scenes])
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids, at)
    wanted = [right[:, question, None].expand(-1, at.shape[1]) for question in range(len(logits))]
    losses = [
        functional.cross_entropy(a.float().flatten(0, 1), b.flatten()) for a, b in zip(logits, wanted, strict=True)
    ]
    hits = [float((a.argmax(-1) == b).float().mean()) for a, b in zip(logits, wanted, strict=True)]
    return torch.stack(losses).sum(), hits


def train(args: argparse.Namespace) -> None:
    """Run the training from wherever its checkpoint left it, and write WORK/text_encoder."""
    torch.manual_seed(args.seed)
    words = tokenizer.build(args.work / "tokenizer")
    model = Reader(new_text_encoder(words))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01)
    run = Run(model, optimizer, Ema(model, 0.99), np.random.default_rng(args.seed), args.work / "text.pt")
    run.resume()
    progress = Progress(args.steps)
    while run.going(args.steps):
        set_lr(optimizer, run.step, args.steps, args.lr)
        scenes = [data.random_scene(run.rng) for _ in range(args.batch)]
        loss, (thing, colour, size, place) = loss_of(model, words, scenes, run.rng)
        run.learn(loss)
        progress.add(run.step, loss=loss.item(), thing=thing, colour=colour, size=size, place=place)
        run.save_if_due(args.save_minutes)
    run.save()
    average = run.ema.module
    assert isinstance(average, Reader)
    average.text_encoder.save_pretrained(args.work / "text_encoder")


def main(argv: list[str] | None = None) -> None:
    """Read the flags and train."""
    train(arguments("Teach the text encoder to read", steps=1500, lr=1e-3, batch=64).parse_args(argv))


if __name__ == "__main__":
    main()
