"""A model of any function, for tests of what the command does with unusual features."""

import torch


class Odd(torch.nn.Module):
    """A model that `features` makes of normalised images (n, 3, h, w)."""

    def __init__(self, features):
        super().__init__()
        self.weight, self.features = torch.nn.Parameter(torch.ones(1)), features

    def forward(self, x):
        return self.features(x) * self.weight
