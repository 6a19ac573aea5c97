"""A classifier of other things passes on what it knows of those that stay."""

from pathlib import Path

import torch

from imagemesh_training import data, train_vit


def test_a_classifier_of_more_things_keeps_its_answers_for_those_that_stay(tmp_path: Path) -> None:
    names = [thing.name for thing in data.things()]
    before = train_vit.new_vit().eval()
    shuffled = ["zebra", *reversed(names)]
    before.classifier = torch.nn.Linear(before.config.hidden_size, len(shuffled))
    before.config.id2label = dict(enumerate(shuffled))
    before.config.label2id = {name: i for i, name in enumerate(shuffled)}
    before.save_pretrained(tmp_path)

    after = train_vit.known(tmp_path).eval()

    assert [after.config.id2label[i] for i in range(len(names))] == names
    pixels = torch.randn(2, 3, data.PICTURE, data.PICTURE)
    with torch.no_grad():
        expected = before(pixels).logits[:, [shuffled.index(name) for name in names]]
        torch.testing.assert_close(after(pixels).logits, expected)


def test_a_classifier_of_the_same_things_is_taken_as_it_is(tmp_path: Path) -> None:
    before = train_vit.new_vit()
    before.save_pretrained(tmp_path)
    after = train_vit.known(tmp_path)
    assert torch.equal(after.classifier.weight, before.classifier.weight)
