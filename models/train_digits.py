"""Train the two small digit classifiers of this folder and export them with their data.

    pip install torch==2.13.0 scikit-learn onnx onnxscript numpy
    python models/train_digits.py [--only cnn|transformer]

For each network this writes `<name>.onnx`, `<name>_calib.npz` and `<name>_val.npz` beside the
script, on one thread and under a fixed seed.

The images are the 1,797 handwritten 8x8 digits of scikit-learn's `load_digits`: the test set of
the UCI ML hand-written digits ("Optical Recognition of Handwritten Digits", E. Alpaydin and
C. Kaynak, 1998), shipped with scikit-learn under its BSD 3-Clause licence.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.onnx import TrainingMode

FOLDER = Path(__file__).parent
SEED, OPSET = 20, 17
CLASSES = 10
GRAY_LEVELS = 16  # a pixel of the data set is an integer from 0 to 16
DIGIT_SIDE, IMAGE_SIDE = 8, 32
CALIB_COUNT, VAL_COUNT, BATCH = 200, 477, 32


class Samples(NamedTuple):
    """Images of shape (count, 1, 8, 8) with values from 0 to 1, and their digits."""

    pixels: Tensor
    labels: Tensor


def load_splits() -> dict[str, Samples]:
    """Shuffle the data set once and cut it into three disjoint splits."""
    images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    pixels = images.float().div(GRAY_LEVELS).view(-1, 1, DIGIT_SIDE, DIGIT_SIDE)
    order = torch.from_numpy(np.random.default_rng(SEED).permutation(len(labels)))
    parts = order.tensor_split([CALIB_COUNT, CALIB_COUNT + VAL_COUNT])
    splits = (Samples(pixels[part], labels[part]) for part in parts)
    return dict(zip(("calib", "val", "train"), splits, strict=True))


def jitter(pixels: Tensor) -> Tensor:
    """Turn and shift most of the images a little at random, for training only."""
    count = len(pixels)
    angle = (torch.rand(count) - 0.5) * math.radians(24)
    shift = (torch.rand(count, 2, 1) - 0.5) * (2.5 / DIGIT_SIDE)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1)
    placement = torch.cat([turn.view(count, 2, 2), shift], dim=2)
    grid = functional.affine_grid(placement, list(pixels.shape), align_corners=False)
    moved = functional.grid_sample(pixels, grid, align_corners=False)
    return torch.where(torch.rand(count, 1, 1, 1) < 0.3, pixels, moved)


def to_image(pixels: Tensor) -> Tensor:
    """Enlarge to 32x32, in whole sixteenths: they are exact in float32 and compress well."""
    large = functional.interpolate(pixels, size=(IMAGE_SIDE, IMAGE_SIDE), mode="bilinear")
    return large.mul(GRAY_LEVELS).round().div(GRAY_LEVELS)


def to_tokens(pixels: Tensor) -> Tensor:
    """Read the image row by row: one token per pixel, its gray level as the id."""
    return pixels.flatten(1).mul(GRAY_LEVELS).round().long()


def conv_norm(inputs: int, outputs: int, kernel: int, groups: int = 1) -> nn.Sequential:
    """A convolution that keeps the image size, and its batch normalization."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    """Two convolutions whose result is added to their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first, second = (conv_norm(width, width, 3) for _ in range(2))
        self.body = nn.Sequential(first, nn.ReLU(), second)

    def forward(self, features: Tensor) -> Tensor:
        return functional.relu(features + self.body(features))


class Branches(nn.Module):
    """A 3x3 and a 1x1 convolution of the same input, concatenated."""

    def __init__(self, inputs: int, wide: int, narrow: int) -> None:
        super().__init__()
        self.wide = nn.Sequential(conv_norm(inputs, wide, 3), nn.ReLU())
        self.narrow = nn.Sequential(conv_norm(inputs, narrow, 1), nn.ReLU())

    def forward(self, features: Tensor) -> Tensor:
        return torch.cat([self.wide(features), self.narrow(features)], dim=1)


def inverted_bottleneck(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Widen, filter each channel by itself, narrow: the depthwise-separable block with ReLU6."""
    widen, narrow = conv_norm(inputs, hidden, 1), conv_norm(hidden, outputs, 1)
    depthwise = conv_norm(hidden, hidden, 3, groups=hidden)
    return nn.Sequential(widen, nn.ReLU6(), depthwise, nn.ReLU6(), narrow)


def digits_cnn() -> nn.Sequential:
    """A convolutional network of the blocks that are met most often in practice."""
    stem = nn.Sequential(conv_norm(1, 64, 3), nn.ReLU())
    fine = nn.Sequential(stem, Residual(64), inverted_bottleneck(64, 128, 64), nn.MaxPool2d(2))
    coarse = nn.Sequential(Branches(64, 48, 32), nn.MaxPool2d(2), conv_norm(80, 64, 3), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES))
    return nn.Sequential(fine, coarse, head)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.split_heads = (-1, DIGIT_SIDE**2, heads, width // heads)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        parts = self.query_key_value(tokens).split(self.output.in_features, dim=-1)
        query, key, value = (part.reshape(self.split_heads).transpose(1, 2) for part in parts)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.output(mixed.transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    """Attention and a feed-forward network, each normalized first and added to its input."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads))
        widen, narrow = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.feed_forward = nn.Sequential(nn.LayerNorm(width), widen, nn.GELU(), narrow)

    def forward(self, tokens: Tensor) -> Tensor:
        attended = tokens + self.attention(tokens)
        return attended + self.feed_forward(attended)


class DigitsTransformer(nn.Module):
    """A transformer encoder over the 64 pixels of a digit; near gray levels start out alike."""

    def __init__(self, width: int = 96, heads: int = 4, hidden: int = 256, depth: int = 3) -> None:
        super().__init__()
        ramp = torch.linspace(-1, 1, GRAY_LEVELS + 1)[:, None] * torch.randn(1, width)
        self.embedding = nn.Embedding.from_pretrained(ramp, freeze=False)
        self.position = nn.Parameter(torch.randn(1, DIGIT_SIDE**2, width))
        self.layers = nn.Sequential(*(EncoderLayer(width, heads, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        encoded = self.layers(self.embedding(tokens) + self.position)
        return self.head(self.norm(encoded).mean(dim=1))


class Recipe(NamedTuple):
    """How one network is built, fed, trained and exported."""

    build: Callable[[], nn.Module]
    input_name: str
    encode: Callable[[Tensor], Tensor]
    epochs: int
    learning_rate: float
    export_mode: TrainingMode  # PRESERVE keeps the batch normalizations as nodes


RECIPES = {
    "cnn": Recipe(digits_cnn, "image", to_image, 12, 4e-3, TrainingMode.PRESERVE),
    "transformer": Recipe(DigitsTransformer, "tokens", to_tokens, 60, 1.5e-3, TrainingMode.EVAL),
}


def train(recipe: Recipe, samples: Samples) -> nn.Module:
    """Train a fresh network under a one-cycle schedule of the learning rate."""
    model, count = recipe.build(), len(samples.labels)
    loss = nn.CrossEntropyLoss(label_smoothing=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    steps = recipe.epochs * math.ceil(count / BATCH)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, steps)
    for _ in range(recipe.epochs):
        for batch in torch.randperm(count).split(BATCH):
            optimizer.zero_grad()
            logits = model(recipe.encode(jitter(samples.pixels[batch])))
            loss(logits, samples.labels[batch]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, recipe: Recipe, samples: Samples) -> float:
    """The share of the samples that the network classifies rightly."""
    right = model(recipe.encode(samples.pixels)).argmax(dim=1) == samples.labels
    return right.float().mean().item()


def export(model: nn.Module, recipe: Recipe, example: Tensor, path: Path) -> None:
    """Write a checked ONNX file with a free batch axis `N`."""
    inputs, outputs, mode = [recipe.input_name], ["logits"], recipe.export_mode
    axes = {name: {0: "N"} for name in inputs + outputs}
    fold = {"training": mode, "do_constant_folding": mode is TrainingMode.EVAL}
    names = {"input_names": inputs, "output_names": outputs, "dynamic_axes": axes}
    torch.onnx.export(model, (example,), path, dynamo=False, opset_version=OPSET, **names, **fold)
    onnx.checker.check_model(path, full_check=True)


def save_samples(recipe: Recipe, samples: Samples, path: Path) -> None:
    """Write the samples as the network takes them, under the name of its input."""
    arrays = {recipe.input_name: recipe.encode(samples.pixels), "labels": samples.labels}
    np.savez_compressed(path, **{name: array.numpy() for name, array in arrays.items()})


def make(name: str, splits: dict[str, Samples]) -> None:
    """Train one network and write all of its files."""
    torch.manual_seed(SEED)
    recipe, title = RECIPES[name], f"digits_{name}"
    model = train(recipe, splits["train"])
    export(model, recipe, recipe.encode(splits["calib"].pixels[:2]), FOLDER / f"{title}.onnx")
    for split in ("calib", "val"):
        save_samples(recipe, splits[split], FOLDER / f"{title}_{split}.npz")
    print(f"{title}: validation accuracy {accuracy(model, recipe, splits['val']):.2%}")


def main() -> None:
    """Make the networks that the command line asks for."""
    parser = argparse.ArgumentParser(description="Train and export the digit classifiers.")
    parser.add_argument("--only", choices=RECIPES, help="make this network only")
    only = parser.parse_args().only
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for name in [only] if only else RECIPES:
        make(name, load_splits())


if __name__ == "__main__":
    main()
