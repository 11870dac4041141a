"""An MLP on scikit-learn's digits: 1,797 scanned handwritten digits of 8 × 8 pixels."""

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn


@dataclass(frozen=True)
class Digits:
    """Images as rows of 64 numbers in [0, 1] (float32) and the digits on them (int64)."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def digits() -> Digits:
    """A fifth of the images, chosen by a fixed seed, is kept for the test."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, labels, test_size=0.2, random_state=0, stratify=labels)
    train_x, test_x, train_y, test_y = map(torch.as_tensor, parts)
    return Digits(train_x.float(), train_y, test_x.float(), test_y)


class Classifier(nn.Module):
    """The network and its loss, so that both are there to be replaced."""

    def __init__(self, width: int = 512) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, width), nn.GELU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        )
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def classifier(seed: int = 0) -> Classifier:
    """The same weights for the same seed."""
    torch.manual_seed(seed)
    return Classifier()


def train(model: Classifier, data: Digits, epochs: int = 20, batch: int = 64, seed: int = 0) -> list[float]:
    """Train in place; the loss of every step. The order of the images depends on the seed alone."""
    shuffle = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(epochs):
        for rows in torch.randperm(len(data.train_x), generator=shuffle).split(batch):
            optimizer.zero_grad()
            loss = model.loss(model(data.train_x[rows]), data.train_y[rows])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


@torch.no_grad()
def accuracy(model: Classifier, data: Digits) -> float:
    """The share of the test images that are told right."""
    return (model(data.test_x).argmax(1) == data.test_y).float().mean().item()
