"""Losses that weigh samples by their class, right for volumes, mixed precision and many ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from streaming_balance.errors import ConfigError
from streaming_balance.training.weighted_loss import (
    IGNORE_INDEX,
    ByClass,
    ClassWeightedLoss,
    Reduction,
    by_class_number,
    numbers_like,
    precise,
)


class ClassWeightedMSELoss(ClassWeightedLoss):
    """Mean squared error of each sample, times the weight of its class.

    With weights of 1 it is `nn.MSELoss`.

    Args:
        class_weights: weights of at least 0 by class number, or label -> weight.
        classes: labels in the order of their numbers, such as `shards.classes`; needed where
            weights are given by labels that are text.
        reduction: `mean` over the batch, `weighted_mean` over the sum of the weights, `sum` or
            `none`. Only `mean` (times `loss_scale` of the batch) adds up over ranks.
        ignore_index: a label whose samples weigh 0; they still count as samples under `mean`.

    Raises:
        ConfigError: no weights, negative ones, labels without a number, or another reduction.

    Examples:
        >>> loss = ClassWeightedMSELoss([1.0, 5.0])
        >>> prediction, target = torch.zeros(3, 1, 2, 2, 2), torch.ones(3, 1, 2, 2, 2)
        >>> loss(prediction, target, torch.tensor([0, 1, 1]))
        tensor(3.6667)
    """

    def forward(self, prediction: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        """Give the loss of a batch.

        Args:
            prediction: `(B, ...)` of any rank of at least 2.
            target: of the same shape.
            labels: `(B,)` class numbers, or `(B, K)` shares of the classes, as mixing gives them.

        Returns:
            A number, or `(B,)` under `none`; float32 for half precision, under autocast too.

        Raises:
            ConfigError: shapes that do not fit each other, or class numbers without a weight.
        """
        if prediction.ndim < 2 or prediction.shape != target.shape:
            raise ConfigError(
                f"prediction has shape {tuple(prediction.shape)} and target {tuple(target.shape)}; "
                f"give two of one shape (B, ...), of rank 2 or more."
            )
        # Over all axes but the first, however many: a volume has one more than a picture.
        losses = (precise(prediction) - precise(target)).square().flatten(1).mean(1)
        weights = self._sample_weights(labels, losses)
        return self.reduced(weights * losses, weights)

    def _sample_weights(self, labels: Tensor, losses: Tensor) -> Tensor:
        """Give the weight of every sample; of a mixed one, the mean of its classes' weights."""
        by_class = self.weights_like(losses)
        if labels.is_floating_point() and labels.shape == (len(losses), len(by_class)):
            return (labels * by_class).sum(1)
        return self.weights_of(self.checked_numbers(labels, losses.shape), losses)


class ClassWeightedCrossEntropyLoss(ClassWeightedLoss):
    """Cross entropy of each sample or voxel, times the weight of its true class.

    With weights of 1 and nothing to ignore it is `nn.CrossEntropyLoss`.

    Args:
        class_weights: as in `ClassWeightedMSELoss`.
        classes: as in `ClassWeightedMSELoss`.
        reduction: as in `ClassWeightedMSELoss`; of voxels, `mean` counts every one.
        ignore_index: a label whose samples or voxels weigh 0.
        logit_adjustment: tau * log(prior) by class number, or label -> number, from the prior that
            is sampled: `plan.logit_adjustment(tau)`. It is added to the logits within the loss, so
            that the plain logits predict as if classes were equally frequent.

    Raises:
        ConfigError: as in `ClassWeightedMSELoss`, or a class without an adjustment.

    Source:
        Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, for the adjustment.

    Examples:
        >>> loss = ClassWeightedCrossEntropyLoss([1.0, 1.0])
        >>> loss(torch.tensor([[2.0, 1.0]]), torch.tensor([0]))
        tensor(0.3133)
    """

    logit_adjustment: Tensor | None

    def __init__(
        self,
        class_weights: ByClass,
        *,
        classes: Sequence[str] | None = None,
        reduction: Reduction = "mean",
        ignore_index: int = IGNORE_INDEX,
        logit_adjustment: ByClass | None = None,
    ) -> None:
        super().__init__(
            class_weights, classes=classes, reduction=reduction, ignore_index=ignore_index
        )
        self.register_buffer("logit_adjustment", None, persistent=False)
        if logit_adjustment is None:
            return
        self._added = by_class_number("logit_adjustment", logit_adjustment, classes, is_whole=True)
        if len(self._added) != len(self.class_weights):
            raise ConfigError(
                f"logit_adjustment has {len(self._added)} numbers for {len(self.class_weights)} "
                f"classes; give one for each."
            )
        self.logit_adjustment = torch.tensor(self._added, dtype=torch.float32)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Give the loss of a batch.

        Args:
            logits: `(B, K)` scores before softmax, or `(B, K, ...)` of every voxel.
            labels: `(B, ...)` class numbers, or `(B, K, ...)` shares of the classes.

        Returns:
            A number, or `(B, ...)` under `none`; float32 for half precision, under autocast too.

        Raises:
            ConfigError: shapes that do not fit each other, or class numbers without a weight.
        """
        num_classes = len(self.class_weights)
        if logits.ndim < 2 or logits.shape[1] != num_classes:
            raise ConfigError(
                f"logits have shape {tuple(logits.shape)}; with weights for {num_classes} classes "
                f"give (B, {num_classes}) or (B, {num_classes}, ...)."
            )
        scores = self._adjusted(precise(logits))
        if labels.is_floating_point() and labels.shape == logits.shape:
            return self._of_shares(scores, labels)
        numbers = self.checked_numbers(labels, (len(logits), *logits.shape[2:]))
        losses = functional.cross_entropy(
            scores, numbers, ignore_index=self.ignore_index, reduction="none"
        )
        weights = self.weights_of(numbers, losses)
        return self.reduced(weights * losses, weights)

    def _adjusted(self, scores: Tensor) -> Tensor:
        """Add the logarithm of the sampled prior."""
        if self.logit_adjustment is None:
            return scores
        added = numbers_like(scores, self.logit_adjustment, self._added)
        return scores + _along_classes(added, scores)

    def _of_shares(self, scores: Tensor, shares: Tensor) -> Tensor:
        """Give the loss against shares of the classes: each class's part has its own weight."""
        by_class = _along_classes(self.weights_like(scores), scores)
        weighted = shares.to(scores.dtype) * by_class
        losses = -(weighted * functional.log_softmax(scores, dim=1)).sum(1)
        return self.reduced(losses, weighted.sum(1))


def _along_classes(values: Tensor, scores: Tensor) -> Tensor:
    """Shape `(K,)` values to go with scores `(B, K, ...)`."""
    return values.reshape(1, -1, *(1 for _ in scores.shape[2:]))
