"""What a distilled student begins with, and that it learns."""

import pytest
import torch
from transformers import AutoModelForImageClassification

from imagemesh_training.distill import NotPlain, NotSmaller, Plan, distill, student_of
from tests.support.tiny_vision import BUILDERS


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("teacher") / "vit"
    BUILDERS["vit"](path)
    return AutoModelForImageClassification.from_pretrained(path).eval().requires_grad_(False)


@pytest.mark.parametrize(("layers", "picked"), [(1, [1]), (2, [0, 2]), (3, [0, 1, 2])])
def test_a_student_of_the_same_width_begins_with_evenly_picked_layers(teacher, layers, picked):
    student = student_of(teacher, Plan(layers=layers, width=32))
    assert len(student.vit.layers) == layers
    for ours, theirs in enumerate(picked):
        for name, value in student.vit.layers[ours].state_dict().items():
            assert torch.equal(value, teacher.vit.layers[theirs].state_dict()[name])
    assert torch.equal(student.classifier.weight, teacher.classifier.weight)


def test_a_narrower_student_keeps_the_heads_width_and_the_labels(teacher):
    student = student_of(teacher, Plan(layers=2, width=16))
    assert (student.config.num_attention_heads, student.config.intermediate_size) == (2, 32)
    assert student.config.id2label == teacher.config.id2label
    assert student.classifier.weight.shape == (10, 16)


@pytest.mark.parametrize(("layers", "width"), [(4, 32), (0, 32), (2, 40), (2, 12), (2, 0)])
def test_what_is_not_smaller_is_refused(teacher, layers, width):
    with pytest.raises(NotSmaller, match="at most 3 layers, and a width from 8 to 32 that is a multiple of 8"):
        student_of(teacher, Plan(layers=layers, width=width))


def test_convolutions_are_refused(tmp_path):
    BUILDERS["convnext"](tmp_path / "convnext")
    teacher = AutoModelForImageClassification.from_pretrained(tmp_path / "convnext")
    with pytest.raises(NotPlain, match="convnext can't be made smaller"):
        student_of(teacher, Plan(layers=1, width=8))


def test_the_student_comes_nearer_the_same_way_each_time_and_the_teacher_stays(teacher):
    pixels = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    losses: list[float] = []
    plan = Plan(layers=2, width=32, steps=40, batch=16, lr=2e-3)
    student = distill(teacher, pixels, plan, lambda step, loss: losses.append(loss))
    assert len(losses) == 40
    assert sum(losses[-5:]) < sum(losses[:5]) / 2
    assert not student.training
    again = distill(teacher, pixels, plan)
    assert all(torch.equal(one, two) for one, two in zip(student.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
