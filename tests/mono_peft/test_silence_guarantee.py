"""What silence on a token guarantees where the adapter fires on tokens before it."""

import pytest
import torch

LAST_LAYER = {"layers_to_transform": [1], "target_modules": ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}


def tokens_on_which_a_unit_fires(model, ids):
    """Bool (batch, tokens), by the slow way: a hook on each sigma; and the logits of the pass."""
    fires = torch.zeros(ids.shape, dtype=torch.bool)

    def note(module, args, latents):
        fires.logical_or_((latents != 0).any(-1))

    handles = [
        module.monolora_activation["default"].register_forward_hook(note)
        for module in model.modules()
        if hasattr(module, "monolora_activation")
    ]
    with torch.no_grad():
        logits = model(ids).logits
    for handle in handles:
        handle.remove()
    return fires, logits


@pytest.mark.parametrize(("options", "holds"), [(LAST_LAYER, True), ({"target_modules": "all-linear"}, False)])
def test_silent_tokens_behind_others(llama, random_adapter, options, holds):
    """In the last layer, behind its keys and values, a token is seen at itself only."""
    model = random_adapter(llama, encoder_bias=True, **options)
    for name, parameter in model.named_parameters():
        if "monolora_encoder" in name and name.endswith("bias"):
            torch.nn.init.constant_(parameter, -1.3)  # few units fire
    ids = torch.randint(3, 100, (40, 9), generator=torch.Generator().manual_seed(0))
    fires, logits = tokens_on_which_a_unit_fires(model, ids)
    with torch.no_grad(), model.disable_adapter():
        same = (model(ids).logits == logits).all(-1)
    before = fires.cumsum(1) - fires.long() > 0
    silent_behind = ~fires & before
    assert silent_behind.sum() > 10
    assert same[~fires & ~before].all()  # before the first token that fires, the base's outputs
    assert bool(same[silent_behind].all()) == holds
