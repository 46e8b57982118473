"""Files of a small network, and the check that a bad one changes nothing."""

import pytest
import torch
from public_layout import public_state_dict

import dsnet
from dsnet.variants import Variant

MICRO = Variant(depths=(1, 1, 1, 1), embed_dims=(8, 16, 40, 64), num_heads=(1, 2, 5, 8))


def micro(num_classes=3, **kwargs):
    return dsnet.DSNet(MICRO, num_classes=num_classes, **kwargs)


def micro_state():
    return public_state_dict(MICRO, 3)


def write_pth(path, content, **kwargs):
    torch.save(content, path, **kwargs)
    return path


def assert_same(model, state):
    own = model.state_dict()
    assert list(own) == list(state)
    assert all(torch.equal(own[name], state[name]) for name in own)


def refused(path, match):
    """The error of loading ``path`` into a micro network; asserts that the network kept its own."""
    model = micro()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(dsnet.CheckpointError, match=match) as info:
        dsnet.load_checkpoint(model, path)
    assert_same(model, before)
    message = str(info.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert info.value.path == str(path)
    return message
