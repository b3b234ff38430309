"""The training loader: balanced global batches, this rank's part of each, resumable."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from streaming_balance.config import BalanceSetting, read_settings
from streaming_balance.errors import ConfigError
from streaming_balance.plan.epoch import BalancedPlan
from streaming_balance.storage.labelling import carriers
from streaming_balance.storage.reader import Verify
from streaming_balance.storage.shards import ShardSet
from streaming_balance.stream.ranks import find_ranks
from streaming_balance.training.announcement import about_mixing, announce, announcement
from streaming_balance.training.course import Course
from streaming_balance.training.delivery import Delivery, check_shards, delivery
from streaming_balance.training.iteration import PlannedLoader
from streaming_balance.training.legs import plan_of
from streaming_balance.training.mixing import BatchMixer
from streaming_balance.training.pairing import Mixing, check_can_mix, parse_mixing
from streaming_balance.training.quarantine import Candidates
from streaming_balance.training.requests import Batch, BatchRequest
from streaming_balance.training.sharding import Dealt, ShardingWatch
from streaming_balance.training.state import LoaderState, Position, delivered, mixed_in
from streaming_balance.training.transforms import Transform

logger = logging.getLogger(__name__)

OnError: TypeAlias = Literal["raise", "substitute"]


class BalancedLoader(PlannedLoader):
    """One rank's part of every global batch of a plan. Build it with `train_loader`.

    Args:
        shards: the data set.
        plan: which samples make each global batch.
        split: name of the split.
        rank: data-parallel rank.
        num_ranks: number of data-parallel ranks.
        delivery: how batches are read and handed over.
        mixing: how batches are mixed, or None.
        substitute: whether others stand in for damaged samples.
    """

    def __init__(
        self,
        shards: ShardSet,
        plan: BalancedPlan,
        *,
        split: str,
        rank: int,
        num_ranks: int,
        delivery: Delivery,
        mixing: Mixing | None = None,
        substitute: bool = False,
    ) -> None:
        self._course = Course(
            plan,
            shards_digest=shards.digest,
            rank=rank,
            num_ranks=num_ranks,
            substitutes=substitute,
            mixing=mixing,
            batch_transform=delivery.batch_transform is not None,
        )
        super().__init__(shards, split, delivery=delivery, seed=plan.seed, standing=self._course)
        # The last batch may be the smallest: its ranks exist or the message says why not.
        plan.rank_slots(0, plan.num_steps(0) - 1, rank=rank, num_ranks=num_ranks)
        if mixing is not None:
            check_can_mix(plan, shards, split=split, num_ranks=num_ranks)
            self._mixer = BatchMixer(mixing, num_classes=len(shards.classes), seed=plan.seed)
        self._substitute, self._settings = substitute, plan.settings
        self.rank, self.num_ranks = rank, num_ranks
        self._watch = ShardingWatch(Dealt(rank=rank, num_ranks=num_ranks, is_sampler=False))

    @property
    def plan(self) -> BalancedPlan:
        """Which samples make each global batch."""
        return self._course.plan

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch is to be iterated next.

        The current epoch keeps its position, so calling this at the top of every epoch is fine,
        after a resume too. Another epoch jumps to its first step; what is skipped on the way is
        kept in the state, and an audit does not count it.

        Args:
            epoch: at least 0.

        Raises:
            BalanceError: an iterator of this loader is in use.
        """
        target = Position(operator.index(epoch), 0)
        if target.epoch == self._position.epoch:
            return
        # Fails here rather than in the first step: some shares end at 2**20 epochs.
        self.plan.quotas(target.epoch, 0)
        self._refuse_to_move()
        self._course.jump(target)

    def state_dict(self) -> dict[str, Any]:
        """Give the state: plain values, the same on every rank, to be saved with a checkpoint.

        It counts the batches that the training loop has received, not those read ahead. With
        `on_error="substitute"` a rank records what was damaged in its own part of the batches:
        gather the states of all ranks and save what `merge_states` makes of them.
        """
        return self._course.state().to_dict()

    def load_state_dict(
        self, state: Mapping[str, Any], *, carry_exposure: bool | ShardSet = False
    ) -> None:
        """Continue a run where its state says, on any number of ranks.

        With `carry_exposure` the run goes on under this loader's plan, which may have another
        strategy, seed, batch size or exclusions, or with another mixing: first come those who had
        no turn yet in the current pass of their class under the old plan, in the old order, then
        the new plan's own passes. The epoch of the state begins anew, and from here on turns are
        compared.

        Args:
            state: what `state_dict` gave, perhaps passed through JSON or `torch.save`.
            carry_exposure: whether another plan may go on from the state's; the data set of the old
                plan where that is another one (`open_shards` of its folder).

        Raises:
            ResumeError: the state belongs to another plan or other data, or is damaged: lists what
                differs; iteration has begun; or exposure cannot be carried over.
        """
        self._refuse_after_start()
        saved = LoaderState.from_dict(state)
        tables = [self._shards]
        if isinstance(carry_exposure, ShardSet):
            tables.append(carry_exposure)
        same_mixing = saved.mixing == self._course.state().mixing
        if carry_exposure and not (self._is_this_run(saved) and same_mixing):
            self._course.carry_over(saved, old=plan_of(saved, tables))
            return
        if not saved.complete:
            logger.warning(
                "this state has not the substitutions of all ranks, so that audits of this run "
                "will be incomplete. Save merge_states of the states of all ranks."
            )
        plan = self.plan
        if self._is_this_run(saved) and saved.carried_from is not None:
            plan = plan_of(saved, tables)
        self._course.resume(saved, plan=plan)

    def exposure(self) -> NDArray[np.int64]:
        """Count how often each sample was delivered in this run, over all ranks.

        Returns:
            `(N,)` deliveries per sample number, also as what another sample was mixed with; skipped
            spans are not counted, nor is a run that this one was carried over from.
        """
        state = self._course.state()
        return delivered(self.plan, state) + mixed_in(self.plan, state)

    def stats(self) -> dict[str, Any]:
        """Give what was delivered so far.

        Returns:
            As for every loader `samples`, `bytes`, `seconds_waited` and `class_counts` of this
            process, and `slowest_read`; `substituted`, samples delivered in the place of damaged
            ones by this rank since a state was loaded; and `exposure_spread`, label -> most minus
            least often delivered patient of the run, over all ranks, among those not excluded;
            being mixed into others aside.
        """
        return super().stats() | {
            "substituted": self._course.num_substituted,
            "exposure_spread": self._exposure_spread(),
        }

    def _exposure_spread(self) -> dict[str, int]:
        """Compare, per class, the patient delivered most with the one delivered least."""
        counts = delivered(self.plan, self._course.state())
        spread = {}
        for label, (mine, owner) in self._owners.items():
            per_patient = np.bincount(owner, weights=counts[mine])
            spread[label] = int(np.ptp(per_patient)) if len(owner) else 0
        return spread

    @cached_property
    def _owners(self) -> dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Give, per label, its samples that are not excluded, and their patients' numbers from 0.

        Worked out once: comparing the names of a hundred thousand patients takes a tenth of a
        second, and a training loop may ask for its statistics at every step.
        """
        patients, keys = self._shards.patients(self._split), self._shards.keys(self._split)
        left_out = self.plan.settings["exclude"]
        included = ~(np.isin(patients, left_out) | np.isin(keys, left_out))
        owners = {}
        for number, label in enumerate(self._shards.classes):
            mine = np.flatnonzero(carriers(self._labels, number) & included)
            owners[label] = mine, np.unique(patients[mine], return_inverse=True)[1].reshape(-1)
        return owners

    def _is_this_run(self, saved: LoaderState) -> bool:
        """Say whether a state was saved under this loader's settings, over this data."""
        own = {name: value for name, value in saved.settings.items() if name != "carried_from"}
        return own == self._settings and saved.shards_digest == self._shards.digest

    @property
    def _candidates(self) -> Candidates | None:
        """Who may stand in for damaged samples; None: damage is an error."""
        return self.plan.substitutes if self._substitute else None

    def _num_steps(self, epoch: int) -> int:
        """Count the global batches of an epoch."""
        return self.plan.num_steps(epoch)

    def _request(self, position: Position) -> BatchRequest:
        """Say what this rank's part of a global batch holds."""
        return self._course.request(position)

    def _following(self, position: Position) -> Position | None:
        """Read ahead into the next epoch: training goes on there."""
        return self._after(position)


def train_loader(
    shards: ShardSet,
    *,
    global_batch_size: int,
    balance: BalanceSetting = None,
    seed: int | None = None,
    split: str = "train",
    rank: int | None = None,
    num_ranks: int | None = None,
    dtype: torch.dtype | None = torch.float32,
    size: tuple[int, ...] | None = None,
    transform: Transform | None = None,
    batch_transform: Callable[[Batch], Batch] | None = None,
    mixing: Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
    num_threads: int | None = None,
    workers: int = 0,
    prefetch_bytes: int | None = None,
    verify: Verify = "first",
    on_error: OnError = "raise",
    exclude: Iterable[str] = (),
) -> BalancedLoader:
    """Stream balanced batches of a packed data set for training.

    Args:
        shards: from `open_shards`.
        global_batch_size: samples in a global batch, over all ranks, at least one per rank.
        balance: a strategy's name; a mapping with `name` and options; a `data.balancing` section;
            the path of a YAML file, or what `load_config` gave; a strategy value; None for the
            natural order.
        seed: integer in [0, 2**64 - 1]; None takes `compute.seed` of the YAML file, else 0.
        split: name of a training split.
        rank: data-parallel rank; None looks at torch.distributed, then at `RANK`.
        num_ranks: number of data-parallel ranks; None looks at torch.distributed and `WORLD_SIZE`.
        dtype: dtype of the images; None keeps the stored one, and where samples are stored in
            several, each batch takes the common dtype of its own samples: batches then differ in
            dtype. Masks always keep theirs. With float16 a finite voxel beyond it is refused.
        size: (D, H, W) or (H, W), centre cropped or zero padded; None keeps each sample's shape,
            and a batch of unequal shapes is then a list of tensors.
        transform: `transform(sample)` or `transform(sample, rng)` where samples are read; `rng` is
            a numpy Generator that depends on the sample's place in the run alone. Also a transform
            of MONAI, Albumentations or TorchIO, which then draws from that place too.
        batch_transform: `batch_transform(batch)` in the thread that iterates, after mixing.
        mixing: `{"name": "mixup" or "cutmix", "alpha": 1.0, "probability": 1.0}`: each sample is
            mixed with another of its rank's part, on the device; recorded in the state and audited.
        device: where tensors go; None leaves them in memory, pinned where CUDA is there.
        num_threads: reader threads; None takes this process's share of the processors, at most 8.
            With workers it counts the threads of each, and None is one.
        workers: processes that read and transform, for transforms that hold the interpreter's lock.
            The batches and the state are the same as with 0, which uses threads.
        prefetch_bytes: most bytes of batches read ahead; None is 512 MiB. One batch always is, and
            with workers one for each.
        verify: compare checksums on `first` touch, `always` or `never`.
        on_error: what a damaged sample is: `raise` an error; `substitute` lets another of its class
            that is not in the batch stand in, recorded in the state. Quotas, shapes and the
            batches of other ranks stay as planned.
        exclude: sample keys or patient ids to leave out.

    Returns:
        An iterable of batches: dicts with `image` (b, C, D, H, W) or (b, C, H, W), `label` int64
        (b,) or, of a multi-label data set, (b, K) of 0 and 1, `seg` when packed, `sample` and
        `slot` int64 (b,), `key` and `patient` lists, `epoch`, `step` and `loss_scale`.

    Raises:
        ConfigError: a setting is wrong, or balancing is asked for on a split that is not for
            training.

    Examples:
        >>> from streaming_balance.storage.shards import open_shards
        >>> shards = open_shards("shards/demo")
        >>> with train_loader(shards, global_batch_size=4, balance="class_balanced") as train:
        ...     batch = next(iter(train))
        >>> batch["image"].shape, sorted(batch["label"].tolist())
        (torch.Size([4, 4, 24, 24, 24]), [0, 0, 1, 1])
    """
    check_shards(shards)
    if on_error not in get_args(OnError):
        raise ConfigError(
            f"on_error is {on_error!r}; it must be one of {', '.join(get_args(OnError))}."
        )
    mixed_how = parse_mixing(mixing)
    settings = read_settings(balance)
    if seed is None:
        seed = settings.seed or 0
    found_rank, found_num_ranks = find_ranks(rank, num_ranks)
    plan = BalancedPlan.for_shards(
        shards,
        global_batch_size=global_batch_size,
        balance=settings.strategy,
        seed=seed,
        split=split,
        exclude=exclude,
    )
    # On every rank: settings that are refused are refused everywhere.
    messages = announcement(
        plan, settings, num_ranks=found_num_ranks, classes_declared=shards.classes_declared
    )
    how = delivery(
        dtype=dtype,
        size=size,
        transform=transform,
        batch_transform=batch_transform,
        device=device,
        num_threads=num_threads,
        prefetch_bytes=prefetch_bytes,
        verify=verify,
        workers=workers,
    )
    loader = BalancedLoader(
        shards,
        plan,
        split=split,
        rank=found_rank,
        num_ranks=found_num_ranks,
        delivery=how,
        mixing=mixed_how,
        substitute=on_error == "substitute",
    )
    if not found_rank:
        announce([*messages, *about_mixing(mixed_how)])
    return loader
