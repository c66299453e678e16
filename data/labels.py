"""Whether sets of shards number their classes alike, and who has to care.

Labels of several sets say something together only where all have labels and class 3 is the same
class in each. An objective that reads none takes any sets: where they number their classes
differently every image counts as one of class 0, as without labels. What reads labels all the same
is refused here, by the key of the config that asks for it: evaluators that learn from training
images, and what compares held-out labels with theirs. Names and numbers of classes are all there is
to go by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from data.errors import DataError
from data.remote import shown


class LabelsDisagree(DataError):
    """Sets that are there, whose labels cannot be learned together."""


@dataclass(frozen=True)
class Classes:
    """How the samples of a set, or of several, are numbered.

    number: of classes; 1 where labels mean nothing.
    names: of the classes, where the manifests know them.
    labelled: whether labels mean anything; else all samples are given out as of class 0.
    discord: why nobody can learn from the labels of several sets; empty where one can.
    """

    number: int
    names: list[str] | None = None
    labelled: bool = True
    discord: str = ""


def joined(found: Sequence[tuple[str, Classes]], field: str, read: bool) -> Classes:
    """The classes of (where it is, what it has) together.

    LabelsDisagree, naming `field`, where labels are to be `read`, and sets number them differently
    or some have none: their images would be learned as of class 0.
    """
    named = [(home, own.names) for home, own in found if own.names]
    for home, names in named[1:]:
        if names != named[0][1]:
            why = f"{shown(home)} and {shown(named[0][0])} number their classes differently"
            if read:
                raise LabelsDisagree(
                    f"{field}: {why}; write them again from one list of classes, or train with "
                    "an objective that reads no labels"
                )
            return Classes(1, None, False, why)
    if within := [own for _, own in found if own.discord and not own.labelled]:
        return within[0]
    with_labels = [home for home, own in found if own.labelled]
    without = [home for home, own in found if not own.labelled]
    why = next((own.discord for _, own in found if own.discord), "")
    if with_labels and without and not why:
        why = f"{shown(with_labels[0])} has labels and {shown(without[0])} has none"
        if read:
            raise LabelsDisagree(
                f"{field}: {why}; leave the latter out, adopt it with its labels (`python -m "
                "data.check --label-key`), or train with an objective that reads no labels"
            )
    number = max(own.number for _, own in found)
    return Classes(number, named[0][1] if named else None, bool(with_labels), why)


def check_learnable(train: Classes, learners: Sequence[str]) -> None:
    """Refuse to let `learners`, keys of evaluators, learn where training labels mean nothing."""
    why = train.discord or ("" if train.labelled else "the shards have none")
    if why and learners:
        keys = " and ".join(learners)
        raise DataError(
            f"{keys} cannot learn from the labels of data.train: {why}; delete {keys}, or name "
            "sets that all have labels, written from one list of classes"
        )


def check_same_classes(
    train: Classes, val: Classes, learners: Sequence[str] = (), num_classes: int | None = None
) -> None:
    """An accuracy without labels, or by other numbers for the same classes, would mean nothing.

    It is only asked where labels are compared, by a classifier or by `learners`.

    Args:
        learners: keys of evaluators that learn from training labels and are tested on these.
        num_classes: of the model, 0 without a classifier; None: those of the training set.
    """
    keys = " and ".join(learners)
    if not val.labelled:
        tested = "the model's classes" if num_classes != 0 else keys
        mend = "leave data.val out" if num_classes != 0 else f"delete {keys}"
        raise DataError(
            f"{tested} cannot be tested on data.val.shards, which has no labels; name shards with "
            f"labels, or {mend}"
        )
    if not train.labelled and num_classes:  # the classes are a teacher's
        if val.number > num_classes:
            raise DataError(
                f"data.val.shards has {val.number} classes and the model {num_classes}; set "
                "model.kwargs.num_classes to those of the teacher, or name shards of its classes"
            )
        return
    named = train.names and val.names
    if (named and train.names != val.names) or val.number > train.number:
        mend = "" if num_classes != 0 else f", or delete {keys}"
        raise DataError(
            f"data.val.shards ({val.number} classes) number their classes differently than "
            f"data.train.shards ({train.number} classes); write both from one list of classes{mend}"
        )
