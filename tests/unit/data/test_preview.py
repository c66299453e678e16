"""A dry run takes and refuses what a start would."""

from __future__ import annotations

import pytest

from data.errors import DataError
from data.labels import LabelsDisagree
from data.preview import Preview
from tests.unit.data.making import amend

RUN = {
    "world_size": 2,
    "seed": 7,
    "global_batch_size": 16,
    "pairs": False,
    "input_size": (1, 8, 8),
    "mean": (0.5,),
    "std": (0.5,),
    "interpolation": "bilinear",
}


@pytest.fixture
def config(make_set, make_config):
    """Two sets of other classes to train on, and one of them to evaluate on."""
    sections = [
        {"shards": str(amend(make_set([6, 6], name), label_names=names))}
        for name, names in (("a", ["ant", "bee", "cat"]), ("b", ["boat", "car", "den"]))
    ]
    return make_config(sections, val={"shards": sections[1]["shards"]})


def test_sets_of_other_classes_are_described_where_no_label_is_read(config):
    preview = Preview(config, labelled=False)
    assert (preview.missing, preview.num_classes) == ("", 1)
    shards, sample, labels, held_out = preview.describe(**RUN, num_classes=0)
    assert shards.startswith("4 shards, 24 images, for 2 x 1 workers")
    assert "class" not in sample
    assert "number their classes differently" in labels
    assert held_out == "12 held-out images"


def test_sets_of_other_classes_are_refused_where_labels_are_read(config):
    """They are there; only shards that are missing may come later."""
    with pytest.raises(LabelsDisagree, match=r"number their classes differently"):
        Preview(config)


def test_what_learns_from_their_labels_is_refused_as_by_a_start(config):
    preview = Preview(config, labelled=False, learners=["eval.linear_probe"])
    with pytest.raises(DataError, match=r"eval\.linear_probe cannot learn"):
        preview.describe(**RUN, num_classes=0)


def test_a_labelled_set_is_described_with_its_classes(make_set, make_config):
    shards, sample, *rest = Preview(make_config(make_set([6, 6]))).describe(**RUN, num_classes=3)
    assert "12 images of 3 classes" in shards
    assert ", class " in sample
    assert not rest
