"""Models of any function, for tests of what the command does with unusual features; timm knows them by name."""

import torch
from timm.models import register_model


class Odd(torch.nn.Module):
    """A model that `features` makes of normalised images (n, 3, h, w)."""

    def __init__(self, features):
        super().__init__()
        self.weight, self.features = torch.nn.Parameter(torch.ones(1)), features

    def forward(self, x):
        return self.features(x) * self.weight


@register_model
def odd_width_by_batch(pretrained, **kwargs):
    return Odd(lambda x: torch.ones(len(x), len(x)))


@register_model
def odd_width_by_image(pretrained, **kwargs):
    return Odd(lambda x: x.flatten(1)[:, : 40 if x.mean() > 0.5 else 30])


@register_model
def odd_negative(pretrained, **kwargs):
    return Odd(lambda x: -x.flatten(1).abs() - 1)


@register_model
def odd_pixels(pretrained, **kwargs):
    return Odd(lambda x: x.flatten(1))


@register_model
def odd_large_pixels(pretrained, **kwargs):
    return Odd(lambda x: 2.0**9 * x.flatten(1))


@register_model
def odd_silent(pretrained, **kwargs):
    """Nothing for images of some brightness."""
    return Odd(lambda x: x.flatten(1) * (x.mean(dim=(1, 2, 3)) > -0.05)[:, None])
