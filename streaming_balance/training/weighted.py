"""Weighted samplers under the names users know, drawn from a plan.

`torch.utils.data.WeightedRandomSampler` draws each index on its own: a batch of 8 from two balanced
classes has no sample of one of them once in 128 batches, an epoch misses a third of the patients,
and 2**24 weights are its limit. The samplers made here have the same shares and none of that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sized
from dataclasses import replace
from typing import Any, SupportsFloat, cast

import numpy as np
import torch

from streaming_balance.config import BalanceSetting, resolve_balance
from streaming_balance.errors import ConfigError
from streaming_balance.plan.options import as_in_data, is_number, order_labels, whole_number
from streaming_balance.plan.strategies import ManualWeights
from streaming_balance.plan.strategy import Strategy
from streaming_balance.training.labels import Labels, plain_labels
from streaming_balance.training.samplers import BalancedSampler

# Weights by these names are no strategy's name, or another strategy's: ones for every class leave
# the natural shares.
WEIGHTINGS = {"balanced": "class_balanced", "uniform": "instance_balanced"}


def get_weighted_sampler(
    labels: Labels,
    strategy: BalanceSetting = "inverse_freq",
    num_samples: int | None = None,
    replacement: bool = True,
    generator: torch.Generator | None = None,
) -> BalancedSampler:
    """Sample with weights that follow from the class sizes.

    Args:
        labels: `(N,)` one label per sample of the dataset.
        strategy: `inverse_freq` (also `inverse_frequency`, `balanced`), `effective_num`, `uniform`
            (the same weight for every sample, so natural shares), or whatever `train_loader` takes
            as `balance`.
        num_samples: draws per epoch over all ranks; None: as many as there are samples.
        replacement: False: nobody twice in an epoch, whose length then is what the scarcest class
            allows.
        generator: its initial seed is the plan's seed; its state is left alone. None is seed 0.

    Returns:
        A sampler of indices with `len`, `set_epoch`, `state_dict` and `load_state_dict`; under
        several ranks, of this rank's part. For exact batches use `BalancedBatchSampler`.

    Raises:
        ConfigError: an argument is out of its range or does not fit the labels.

    Examples:
        >>> labels = [0] * 90 + [1] * 10
        >>> sampler = get_weighted_sampler(labels)
        >>> len(sampler), sum(labels[index] for index in sampler)
        (100, 50)
    """
    if isinstance(strategy, str):
        strategy = WEIGHTINGS.get(strategy, strategy)
    parsed, configured_seed = resolve_balance(strategy)
    seed = configured_seed if generator is None else _initial_seed(generator)
    return _sampler(labels, parsed, num_samples=num_samples, replacement=replacement, seed=seed)


def create_weighted_sampler(
    targets: Labels,
    class_weights: Mapping[Any, float] | Labels,
    replacement: bool = True,
    num_samples: int | None = None,
    seed: int = 0,
) -> BalancedSampler:
    """Sample with a weight per sample of each class, as `WeightedRandomSampler` takes them.

    Args:
        targets: `(N,)` one label per sample of the dataset.
        class_weights: label -> weight above 0; or a list, array or tensor of weights, in label
            order or, as in `class_weights[targets]`, by the number that a label is.
        replacement: as for `get_weighted_sampler`.
        num_samples: as for `get_weighted_sampler`.
        seed: integer in [0, 2**64 - 1].

    Returns:
        A sampler as `get_weighted_sampler` gives it; class c has the share n_c w_c / sum(n w).

    Raises:
        ConfigError: an argument is out of its range or does not fit the labels, or weights come as
            a list while the labels are text.

    Examples:
        >>> targets = ["HGG"] * 210 + ["LGG"] * 75
        >>> sampler = create_weighted_sampler(targets, {"HGG": 1.0, "LGG": 2.8})
        >>> [targets[index] for index in sampler].count("LGG") in (142, 143)
        True
    """
    labels = _distinct(targets)
    _check_one_per_class(class_weights, targets, labels)
    weights = _by_label(class_weights, labels)
    return _sampler(
        targets,
        ManualWeights(weights=weights),
        num_samples=num_samples,
        replacement=replacement,
        seed=seed,
    )


def _sampler(
    labels: Labels,
    strategy: Strategy,
    *,
    num_samples: int | None,
    replacement: bool,
    seed: int | None,
) -> BalancedSampler:
    """Build the sampler, the arguments over what the strategy says."""
    given: dict[str, Any] = {}
    if num_samples is not None:
        number = whole_number(num_samples)
        given["num_samples"] = num_samples if number is None else number
    if replacement is not True:
        given["replacement"] = replacement
    return BalancedSampler(labels, balance=replace(strategy, **given), seed=seed)


def _distinct(targets: Labels) -> list[str]:
    """List the labels as text, in class order."""
    try:
        array = np.asarray(plain_labels(targets))
    except ValueError:
        array = np.empty((0, 0))
    if array.ndim != 1:
        raise ConfigError(
            "targets have several labels per sample, and a weight per class wants one. Use "
            "get_weighted_sampler(labels, strategy='repeat_factor'), which weighs a sample by its "
            "rarest label."
        )
    labels = np.unique(array.astype(np.str_) if array.dtype == object else array)
    return [str(label) for label in order_labels(labels.tolist())]


def _check_one_per_class(
    class_weights: Mapping[Any, float] | Labels, targets: Labels, labels: list[str]
) -> None:
    """Refuse what `WeightedRandomSampler` takes: read as weights of classes it would pass."""
    if isinstance(class_weights, Mapping):
        return
    numbers = [int(label) + 1 for label in labels if label.isdecimal()]
    count, samples = len(cast(Sized, class_weights)), len(cast(Sized, targets))
    if count == samples > max([len(labels), *numbers]):
        raise ConfigError(
            f"class_weights has {count} entries, one per sample, and this function takes one per "
            f"class. For weights by sample use BalancedSampler(targets, balance={{'name': "
            f"'sample_weights', 'weights': [...]}})."
        )


def _by_label(
    class_weights: Mapping[Any, float] | Labels, labels: list[str]
) -> dict[str, float] | list[float]:
    """Give weights by label as text; a list is given back where its order is not certain."""
    if isinstance(class_weights, Mapping):
        named = {str(label): _number(weight) for label, weight in class_weights.items()}
    else:
        if isinstance(class_weights, torch.Tensor):
            class_weights = class_weights.detach().cpu().tolist()
        weights = [_number(weight) for weight in np.asarray(class_weights).ravel().tolist()]
        if not all(is_number(label) for label in labels):
            return weights
        if len(weights) == len(labels):
            return dict(zip(labels, weights, strict=True))
        if not all(label.isdecimal() and int(label) < len(weights) for label in labels):
            return weights
        # A weight for every number from 0, as `weights[targets]` wants them.
        named = {label: weights[int(label)] for label in labels}
    named = as_in_data(named, labels)
    # What has no samples needs no weight: normalised weights give it 0.
    return {label: weight for label, weight in named.items() if weight or label in labels}


def _number(weight: object) -> float:
    """Give a weight of any library as a float."""
    try:
        return float(cast(SupportsFloat, weight))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"class_weights has {weight!r}; weights are numbers above 0, such as "
            f"{{'LGG': 2.8, 'HGG': 1.0}}."
        ) from error


def _initial_seed(generator: object) -> int:
    """Give the seed a generator was made with; reading it does not change its state."""
    if not isinstance(generator, torch.Generator):
        raise ConfigError(
            f"generator is {type(generator).__name__}; it must be a torch.Generator, such as "
            f"torch.Generator().manual_seed(42), or None."
        )
    return generator.initial_seed()
