"""Teach the text encoder to read captions, before the UNet meets it. `python -m imagemesh_training.train_text`.

From a random start the UNet would have to bind 175 names through noise; here the encoder learns first, in minutes and
without noise, to tell thing, colour, size and place apart, and to sketch the picture: each of the last 16 positions,
which are padding in any but the longest prompt, has to hold what its 16th of the picture looks like, 2x2 of the
latents. The UNet's cross-attention, at 4x4, finds there what to draw where. Positions from the end token
on are asked: CLIP's attention is causal, so those are the ones that have read the whole caption.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer

from imagemesh_training import data, latents, tokenizer
from imagemesh_training.captions import caption
from imagemesh_training.common import Ema, Progress, Run, arguments, autocast, set_lr
from imagemesh_training.train_unet import PICTURES, WIDTH, new_text_encoder

SKETCH = 16  # last positions, row by row a 4x4 grid over the picture
PATCH = 16 * 2 * 2  # numbers in a 16th of a picture's latents
CAPTION = 22  # tokens of the longest caption, with its start and end
EMPTY = 0.05  # share of captions left out: what guidance steers away from is then the mean of all pictures


class Reader(nn.Module):
    """The text encoder with one head a question; the heads are thrown away afterwards."""

    def __init__(self, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        answers = (len(data.things()), len(data.COLOURS), len(data.SIZES), len(data.PLACES))
        self.heads = nn.ModuleList(nn.Linear(WIDTH, count) for count in answers)
        self.look = nn.Linear(WIDTH, PATCH)

    def forward(
        self, ids: torch.Tensor, at: torch.Tensor, kept: torch.Tensor
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Token ids (n, 77), of which the positions `kept` (m,) are read and those `at` (n, k), of these m, asked.

        Returns:
            logits (n, k, answers) of every question, and the sketch (n, 16, 64).
        """
        states = self.text_encoder(ids[:, kept], position_ids=kept[None]).last_hidden_state
        asked = states.gather(1, at[..., None].expand(-1, -1, WIDTH))
        return [head(asked) for head in self.heads], self.look(states[:, -SKETCH:])


def patches(looks: torch.Tensor) -> torch.Tensor:
    """Latents (n, 16, 8, 8) -> 2x2 of them a row, (n, 16, 64)."""
    return functional.pixel_unshuffle(looks, 2).flatten(2).transpose(1, 2)


def answers_of(scene: data.Scene) -> tuple[int, int, int, int]:
    """The right answers as indexes: thing, colour, size, place."""
    colours = list(data.COLOURS)
    return scene.thing, colours.index(scene.colour), data.SIZES.index(scene.size), data.PLACES.index(scene.place)


def positions(ids: torch.Tensor, end: int, rng: np.random.Generator, count: int = 3) -> torch.Tensor:
    """The end token's position of each row, then `count` random later ones: (n, count + 1)."""
    first = (ids == end).int().argmax(1).numpy()
    later = rng.integers(first[:, None], ids.shape[1], (len(ids), count))
    return torch.from_numpy(np.concatenate([first[:, None], later], axis=1))


def some_positions(rng: np.random.Generator) -> torch.Tensor:
    """All 77, or, which is twice as fast, mostly those that matter: a caption's, a few in between, the sketch's."""
    if rng.random() < 0.3:
        return torch.arange(tokenizer.LENGTH)
    between = rng.choice(np.arange(CAPTION, tokenizer.LENGTH - SKETCH), 4, replace=False)
    return torch.cat(
        [
            torch.arange(CAPTION),
            torch.from_numpy(np.sort(between)),
            torch.arange(tokenizer.LENGTH - SKETCH, tokenizer.LENGTH),
        ]
    )


def loss_of(
    model: Reader, words: CLIPTokenizer, scenes: list[data.Scene], looks: torch.Tensor, rng: np.random.Generator
) -> tuple[torch.Tensor, dict[str, float]]:
    """Cross-entropy of the questions plus the error of the sketch of `looks` (n, 16, 8, 8); and each on its own."""
    texts = [caption(scene, rng) if rng.random() > EMPTY else "" for scene in scenes]
    ids = words(texts, padding="max_length", max_length=tokenizer.LENGTH, return_tensors="pt").input_ids
    kept = some_positions(rng)
    at = positions(ids[:, kept], int(words.eos_token_id), rng)
    right = torch.tensor([answers_of(scene) for scene in scenes])
    with autocast():
        logits, look = model(ids, at, kept)
    wanted = [right[:, question, None].expand(-1, at.shape[1]) for question in range(len(logits))]
    losses = [
        functional.cross_entropy(a.float().flatten(0, 1), b.flatten()) for a, b in zip(logits, wanted, strict=True)
    ]
    hits = [float((a.argmax(-1) == b).float().mean()) for a, b in zip(logits, wanted, strict=True)]
    error = functional.mse_loss(look.float(), patches(looks))
    figures = dict(zip(("thing", "colour", "size", "place"), hits, strict=True)) | {"look": error.item()}
    return 0.5 * torch.stack(losses).sum() + 4 * error, figures


def train(args: argparse.Namespace) -> None:
    """Run the training from wherever its checkpoint left it, and write WORK/text_encoder."""
    torch.manual_seed(args.seed)
    words = tokenizer.build(args.work / "tokenizer")
    sprites = data.load_sprites(args.work / "cache")
    vae = AutoencoderKL.from_pretrained(args.vae or args.work / "vae").eval()
    cached = latents.load_or_make(args.work / "cache" / "latents.npz", vae, sprites, args.pictures, args.seed)
    model = Reader(new_text_encoder(words))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01)
    run = Run(model, optimizer, Ema(model, 0.99), np.random.default_rng(args.seed), args.work / "text.pt")
    run.resume()
    progress = Progress(args.steps)
    while run.going(args.steps):
        set_lr(optimizer, run.step, args.steps, args.lr)
        picked = cached.pick(run.rng, args.batch, args.focus)
        loss, figures = loss_of(model, words, [cached.scenes[i] for i in picked], cached.at(picked), run.rng)
        run.learn(loss)
        progress.add(run.step, loss=loss.item(), **figures)
        run.save_if_due(args.save_minutes)
    run.save()
    average = run.ema.module
    assert isinstance(average, Reader)
    average.text_encoder.save_pretrained(args.work / "text_encoder")


def main(argv: list[str] | None = None) -> None:
    """Read the flags and train."""
    parser = arguments("Teach the text encoder to read", steps=1000, lr=1e-3, batch=64)
    parser.add_argument("--vae", type=Path, help="VAE folder; default WORK/vae")
    parser.add_argument("--pictures", type=int, default=PICTURES, help="how many scenes to encode beforehand")
    parser.add_argument("--focus", type=float, default=0.5, help="extra share of plain scenes, which teach the names")
    train(parser.parse_args(argv))


if __name__ == "__main__":
    main()
