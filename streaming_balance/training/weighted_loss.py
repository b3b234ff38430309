"""What losses by class share: weights by class number, checked labels, and the reduction."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn

from streaming_balance.config import Config, read_settings
from streaming_balance.errors import ConfigError, did_you_mean
from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.plan.loss_weights import double_correction, plan_loss_weights
from streaming_balance.plan.options import listed, order_labels
from streaming_balance.training.class_weights import LabelWeights, class_numbers, is_class_number

logger = logging.getLogger(__name__)

Reduction = Literal["mean", "weighted_mean", "sum", "none"]
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)
# As in torch: a label that says "leave this one out".
IGNORE_INDEX = -100
CLASSES_SHOWN = 20

ByClass = Mapping[Any, float] | Sequence[float] | Tensor


class ClassWeightedLoss(nn.Module):
    """A weight per class number, and how the weighted losses of samples become one number.

    Args:
        class_weights: weights of at least 0 by class number, or label -> weight.
        classes: labels in the order of their numbers, such as `shards.classes`; needed where
            weights are given by labels that are text.
        reduction: `mean` divides the weighted sum by the samples of the batch, so that ranks add up
            (see `loss_scale` of a batch); `weighted_mean` divides by the sum of the weights, as
            torch's CrossEntropyLoss does, and does not add up over ranks; `sum`; `none`.
        ignore_index: a label whose samples weigh 0; they still count as samples under `mean`.

    Raises:
        ConfigError: no weights, negative ones, labels without a number, or another reduction.
    """

    class_weights: Tensor

    def __init__(
        self,
        class_weights: ByClass,
        *,
        classes: Sequence[str] | None = None,
        reduction: Reduction = "mean",
        ignore_index: int = IGNORE_INDEX,
    ) -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            hint = did_you_mean(str(reduction), REDUCTIONS)
            raise ConfigError(f"reduction is {reduction!r}; allowed: {listed(REDUCTIONS)}.{hint}")
        self._exact = by_class_number("class_weights", class_weights, classes)
        if min(self._exact) < 0 or not any(self._exact):
            raise ConfigError(
                f"class_weights are {self._exact[:CLASSES_SHOWN]}; use numbers of at least 0, one "
                f"of them above 0."
            )
        buffer = torch.tensor(self._exact, dtype=torch.float32)
        self.register_buffer("class_weights", buffer, persistent=False)
        self.reduction, self.ignore_index = reduction, ignore_index

    @classmethod
    def from_config(
        cls,
        config: str | Path | Config | Mapping[str, Any],
        plan: BalancedPlan,
        *,
        epoch: int | None = None,
        classes: Sequence[str] | None = None,
        reduction: Reduction = "mean",
        ignore_index: int = IGNORE_INDEX,
    ) -> Self:
        """Build the loss that `data.balancing.class_weights` asks for.

        Args:
            config: path of a YAML file, what `load_config` gave, or a `data.balancing` section.
                Where it enables no class weights, all weights are 1.
            plan: the plan the training follows, such as `train.plan`.
            epoch: whose draws `basis: sampled` counts; None: of a schedule, once it has settled.
            classes: the class order somebody declared, such as `shards.classes`; needed where
                `manual_weights` is a list and the labels are text.
            reduction: as above.
            ignore_index: as above.

        Raises:
            ConfigError: the section is wrong or does not fit the classes.

        Examples:
            >>> from streaming_balance.training.losses import ClassWeightedMSELoss
            >>> labels = ["LGG"] * 75 + ["HGG"] * 210
            >>> plan = BalancedPlan.from_labels(labels, global_batch_size=8, balance=None)
            >>> section = {"class_weights": {"enabled": True}}
            >>> ClassWeightedMSELoss.from_config(section, plan).class_weights
            tensor([0.5263, 1.4737])
        """
        settings = read_settings(config).class_weights
        weights = plan_loss_weights(plan, settings, is_ordered=classes is not None, epoch=epoch)
        warning = double_correction(plan, weights)
        if warning is not None:
            logger.warning("%s", warning)
        if classes is None and not all(is_class_number(label) for label in plan.classes):
            classes = plan.classes
        return cls(
            LabelWeights(weights), classes=classes, reduction=reduction, ignore_index=ignore_index
        )

    def extra_repr(self) -> str:
        """Show the weights where torch prints modules."""
        shown = ", ".join(f"{weight:.4g}" for weight in self._exact[:CLASSES_SHOWN])
        more = ", ..." if len(self._exact) > CLASSES_SHOWN else ""
        return f"[{shown}{more}], reduction={self.reduction!r}"

    def weights_like(self, losses: Tensor) -> Tensor:
        """Give the `(K,)` weights by class number, in dtype and place of the losses."""
        return numbers_like(losses, self.class_weights, self._exact)

    def weights_of(self, labels: Tensor, losses: Tensor) -> Tensor:
        """Give the weight of every label, 0 where it is to be ignored."""
        is_counted = labels != self.ignore_index
        return self.weights_like(losses)[labels.where(is_counted, 0)] * is_counted

    def reduced(self, weighted: Tensor, weights: Tensor) -> Tensor:
        """Make one number of weighted losses.

        Args:
            weighted: `(B, ...)` losses times weights.
            weights: the weights, of the same shape.
        """
        if self.reduction == "none":
            return weighted
        if self.reduction == "sum":
            return weighted.sum()
        if self.reduction == "mean":
            return weighted.mean()
        # A batch of nothing but ignored samples has a loss of 0, not 0 / 0.
        total = weights.sum()
        return weighted.sum() / total.where(total > 0, 1.0)

    def checked_numbers(self, labels: Tensor, shape: Sequence[int]) -> Tensor:
        """Give labels as int64 class numbers, one for each place of `shape`.

        Raises:
            ConfigError: fractions, another shape, or a class without a weight.
        """
        if labels.is_floating_point() or labels.is_complex():
            raise ConfigError(
                f"labels have dtype {labels.dtype} and shape {tuple(labels.shape)}; give class "
                f"numbers (int64) of shape {tuple(shape)}, or shares of the {len(self._exact)} "
                f"classes, (B, {len(self._exact)}, ...)."
            )
        if tuple(labels.shape) != tuple(shape):
            raise ConfigError(
                f"labels have shape {tuple(labels.shape)}; give one class number for each place of "
                f"{tuple(shape)}."
            )
        numbers = labels.to(torch.int64)
        # On another device the check would wait for it, and an index out of range fails anyhow.
        if numbers.device.type == "cpu" and not torch.compiler.is_compiling():
            self._check_range(numbers)
        return numbers

    def _check_range(self, numbers: Tensor) -> None:
        """Refuse class numbers that have no weight."""
        counted = numbers[numbers != self.ignore_index]
        wrong = counted[(counted < 0) | (counted >= len(self._exact))]
        if wrong.numel():
            raise ConfigError(
                f"labels hold class {int(wrong[0])}; there are weights for 0 to "
                f"{len(self._exact) - 1}, and {self.ignore_index} is ignored."
            )


def by_class_number(
    setting: str, values: ByClass, classes: Sequence[str] | None, *, is_whole: bool = False
) -> list[float]:
    """Give numbers by class, in the order of class numbers.

    Args:
        setting: the name to use in messages.
        values: numbers by class number, or label -> number.
        classes: labels in the order of their numbers, or None.
        is_whole: whether every class needs a number; otherwise one that was never counted gets 0.

    Raises:
        ConfigError: not finite numbers, text labels without `classes`, or a class left out.

    Examples:
        >>> by_class_number("class_weights", {"HGG": 1.0, "LGG": 2.8}, ["LGG", "HGG"])
        [2.8, 1.0]
    """
    if not isinstance(values, Mapping):
        plain: Any = values.tolist() if isinstance(values, Tensor | np.ndarray) else values
        return _numbers(setting, plain)
    _check_order_known(setting, values, classes)
    numbers = class_numbers(values, classes)
    length = len(classes) if classes is not None else max(numbers.values()) + 1
    # Weights that were counted may lack a class that has no sample; those somebody wrote may not.
    if len(numbers) < length and (is_whole or not isinstance(values, LabelWeights)):
        missing = min(set(range(length)) - set(numbers.values()))
        name = missing if classes is None else classes[missing]
        raise ConfigError(f"{setting} leave out class {name!r}; give every class a number.")
    ordered: list[Any] = [0.0] * length
    for label, number in numbers.items():
        ordered[number] = values[label]
    return _numbers(setting, ordered)


def numbers_like(losses: Tensor, buffer: Tensor, exact: Sequence[float]) -> Tensor:
    """Give numbers in dtype and place of the losses, with all the digits the dtype holds.

    The buffer is float32 and follows the module. Where the losses are float64, the module was cast,
    or it was left on another device, the numbers are made anew.
    """
    if buffer.dtype == losses.dtype == torch.float32 and buffer.device == losses.device:
        return buffer
    return torch.tensor(exact, dtype=losses.dtype, device=losses.device)


def precise(values: Tensor) -> Tensor:
    """Give values in float32 at least: half precision would lose small losses.

    Examples:
        >>> precise(torch.ones(1).bfloat16()).dtype, precise(torch.ones(1).double()).dtype
        (torch.float32, torch.float64)
    """
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def _check_order_known(
    setting: str, values: Mapping[Any, float], classes: Sequence[str] | None
) -> None:
    """Refuse text labels whose numbers nobody said: guessing could boost the majority."""
    if classes is not None or all(is_class_number(label) for label in values):
        return
    # Text that counts from 0, as a YAML file has it, says its numbers itself.
    if [str(label) for label in order_labels(values)] != [str(n) for n in range(len(values))]:
        raise ConfigError(
            f"{setting} are given by labels {listed(list(values)[:CLASSES_SHOWN])}, and a loss "
            f"sees class numbers: say which is which with classes=, such as classes=shards.classes."
        )


def _numbers(setting: str, values: object) -> list[float]:
    """Check that values are finite numbers, at least one."""
    listed_values = values if isinstance(values, Sequence) and not isinstance(values, str) else ()
    if len(listed_values) and all(_is_finite(value) for value in listed_values):
        return [float(value) for value in listed_values]
    raise ConfigError(
        f"{setting} are {values!r:.200}; give one finite number per class, as a list in order of "
        f"class numbers or as label -> number."
    )


def _is_finite(value: object) -> bool:
    """Say whether a value is a finite number."""
    is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    return is_number and math.isfinite(cast(float, value))
