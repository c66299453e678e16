"""Labels that do not agree are no hindrance where nobody reads them, and refused where one does."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from data.errors import DataError
from data.labels import Classes, LabelsDisagree, check_learnable, check_same_classes, joined
from data.mixture import resolve_train
from tests.unit.data.making import amend, vouch
from tests.unit.data.test_loaders import eval_loader, train_loader

ANTS = Classes(3, ["ant", "bee", "cat"])
BOATS = Classes(2, ["boat", "car"])
BARE = Classes(1, labelled=False)
DIFFER = r"b and a number their classes differently"
UNLABELLED = {"labels": "none"}


@pytest.fixture
def differing(make_set):
    """Sections of two sets with other classes, whose samples have the labels 0 to 2."""
    a = amend(make_set([7, 9, 8], "a"), label_names=["ant", "bee", "cat"])
    b = amend(make_set([5, 5], "b"), label_names=["boat", "car", "den"])
    return [{"shards": str(a)}, {"shards": str(b)}]


@pytest.mark.parametrize("read", [True, False])
def test_what_agrees_is_the_same_whether_it_is_read_or_not(read):
    assert joined([("a", ANTS), ("b", ANTS)], "f", read) == ANTS
    assert joined([("a", Classes(2)), ("b", ANTS)], "f", read) == ANTS  # nothing to compare
    assert joined([("a", BARE), ("b", BARE)], "f", read) == BARE


def test_other_names_are_refused_where_labels_are_read_and_no_labels_elsewhere():
    with pytest.raises(LabelsDisagree, match=rf"f: {DIFFER}; write them again from one list"):
        joined([("a", ANTS), ("b", BOATS)], "f", True)
    found = joined([("a", ANTS), ("b", BOATS)], "f", False)
    assert (found.number, found.names, found.labelled) == (1, None, False)
    assert joined([("whole", found), ("c", ANTS)], "f", False) == found
    assert joined([("c", ANTS), ("whole", found)], "f", False) == found


def test_sets_without_labels_leave_the_others_their_classes():
    """As runs of such sets have always counted them."""
    found = joined([("a", BARE), ("b", ANTS)], "f", False)
    assert (found.number, found.names, found.labelled) == (3, ANTS.names, True)
    assert found.discord == "b has labels and a has none"


def test_no_image_without_a_label_is_learned_as_of_class_0():
    with pytest.raises(LabelsDisagree, match=r"^f: b has labels and a has none; leave the latter"):
        joined([("a", BARE), ("b", ANTS)], "f", True)


@pytest.mark.parametrize("train", [BARE, Classes(1, None, False, "x"), Classes(3, discord="x")])
def test_nobody_learns_from_labels_that_mean_nothing(train):
    keys = r"eval\.knn and eval\.linear_probe"
    with pytest.raises(DataError, match=rf"^{keys} cannot learn .* delete {keys}"):
        check_learnable(train, ["eval.knn", "eval.linear_probe"])
    check_learnable(train, [])
    check_learnable(ANTS, ["eval.knn"])


def test_held_out_labels_are_compared_by_whoever_needs_them():
    with pytest.raises(DataError, match=r"^eval\.knn cannot .* no labels; .* or delete eval\.knn$"):
        check_same_classes(ANTS, BARE, ["eval.knn"], 0)
    for train in (ANTS, BARE):  # a classifier's top-1 would be its share of class 0
        with pytest.raises(DataError, match=r"model's classes cannot .* or leave data\.val out$"):
            check_same_classes(train, BARE, num_classes=3)
    with pytest.raises(DataError, match=r"\(2 classes\) .* or delete eval\.knn"):
        check_same_classes(ANTS, BOATS, ["eval.knn"], 0)
    with pytest.raises(DataError, match=r"one list of classes$"):
        check_same_classes(ANTS, BOATS, ["eval.knn"], 3)
    # The classes of a student of unlabelled images are its teacher's.
    check_same_classes(BARE, ANTS, num_classes=3)
    with pytest.raises(DataError, match=r"3 classes and the model 2; set model\.kwargs"):
        check_same_classes(BARE, ANTS, num_classes=2)


def test_mixed_sets_of_other_classes_come_as_sets_without_labels_do(differing, make_config):
    """Samples and order are those of the copies without labels that were needed before."""
    config = make_config(differing, streams=4)
    with pytest.raises(LabelsDisagree, match=r"data\.train: data\.train\.1\.shards and data"):
        resolve_train(config)
    train = resolve_train(config, labelled=False)
    batches = list(itertools.islice(train_loader(config, train=train).batches(0), 12))
    assert {int(label) for batch in batches for label in batch["target"]} == {0}

    for section in differing:
        amend(
            Path(section["shards"]), recipe=UNLABELLED
        )  # though names are left, as by an adoption
    without = resolve_train(config)
    assert without.shards.digest() == train.shards.digest()
    again = itertools.islice(train_loader(config, train=without).batches(0), 12)
    assert [b["key"] for b in again] == [b["key"] for b in batches]


def test_one_source_may_be_several_sets_of_other_classes(differing, make_config):
    both = [section["shards"] for section in differing]
    config = make_config([{"shards": both}])
    with pytest.raises(LabelsDisagree, match=r"data\.train\.0\.shards: \S+manifest\.json and \S+"):
        resolve_train(config)
    found = resolve_train(config, labelled=False).shards
    assert (found.num_classes, found.label_names, found.num_samples) == (1, None, 34)


def test_labels_that_agree_are_given_out_also_where_nobody_reads_them(make_set, make_config):
    """A run from before goes on with the very batches."""
    config = make_config([{"shards": str(make_set([9], name))} for name in "ab"], streams=2)
    read, unread = (
        [next(train_loader(config, train=train).batches(0)) for _ in range(3)]
        for train in (resolve_train(config), resolve_train(config, labelled=False))
    )
    assert [b["target"].tolist() for b in read] == [b["target"].tolist() for b in unread]
    assert len({int(label) for batch in read for label in batch["target"]}) > 1


def test_held_out_labels_that_nobody_reads_may_be_any(differing, make_set, make_config):
    val = make_set([6], "val")
    vouch(val, {"000.tar": 6}, classes=5)
    config = make_config(differing, val={"shards": str(val)})
    train = resolve_train(config, labelled=False)
    loader = eval_loader(config, train=train, num_classes=0)
    assert sum(int(batch["valid"].sum()) for batch in loader) == 6
    for split in ("train", "val"):
        with pytest.raises(DataError, match=r"eval\.knn|\(5 classes\) number"):
            eval_loader(config, train=train, split=split, learners=["eval.knn"], num_classes=0)
