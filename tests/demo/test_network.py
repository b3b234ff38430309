"""The demo's network: same weights for same seeds, blind to gain, judged class by class."""

from __future__ import annotations

import math

import torch

from streaming_balance.demo.network import SmallNetwork, recall_by_class, relative_intensity


def flat(network: SmallNetwork) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def test_initial_weights_depend_on_the_seed_and_nothing_else() -> None:
    torch.manual_seed(1)
    first = flat(SmallNetwork(4, 2, seed=7))
    torch.manual_seed(2)
    assert torch.equal(flat(SmallNetwork(4, 2, seed=7)), first)
    assert not torch.equal(flat(SmallNetwork(4, 2, seed=8)), first)


def test_making_a_network_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    SmallNetwork(4, 2, seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_gain_of_a_scanner_changes_nothing_and_outside_the_brain_is_0() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(100, 900, (2, 4, 5, 6, 7), generator=generator).float()
    image[:, :, 0] = 0
    gains = torch.tensor([0.5, 1.0, 1.5, 3.0]).reshape(1, 4, 1, 1, 1)
    seen = relative_intensity(image)
    torch.testing.assert_close(relative_intensity(image * gains), seen)
    assert not seen[:, :, 0].any()
    torch.testing.assert_close(seen[:, :, 1:].mean((2, 3, 4)), torch.zeros(2, 4), atol=1e-5, rtol=0)


def test_a_volume_of_nothing_is_no_division_by_zero() -> None:
    assert not relative_intensity(torch.zeros(1, 4, 3, 3, 3)).any()


def test_recall_counts_each_class_for_itself() -> None:
    network = SmallNetwork(1, 3, seed=0)
    with torch.no_grad():
        # Whatever the volume, the answer is class 1.
        network.head.weight.zero_()
        network.head.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    image = torch.ones(5, 1, 4, 4, 4)
    batches = [
        {"image": image[:3], "label": torch.tensor([0, 1, 1])},
        {"image": image[3:], "label": torch.tensor([1, 0])},
    ]
    recall = recall_by_class(network, batches, ["a", "b", "none there"])
    assert (recall["a"], recall["b"]) == (0.0, 1.0)
    assert math.isnan(recall["none there"])


def test_recall_is_the_part_named_right() -> None:
    network = SmallNetwork(1, 2, seed=3)
    generator = torch.Generator().manual_seed(5)
    image = torch.randint(1, 900, (40, 1, 8, 8, 8), generator=generator).float()
    label = torch.arange(40) % 2
    with torch.no_grad():
        named = network(image).argmax(dim=1).tolist()
    right = [sum(named[n] == c for n in range(c, 40, 2)) / 20 for c in (0, 1)]
    recall = recall_by_class(network, [{"image": image, "label": label}], ["even", "odd"])
    assert list(recall.values()) == right
