"""The shipped vocabulary reads captions word by word and anything else somehow."""

from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from imagemesh_training import tokenizer
from imagemesh_training.captions import vocabulary


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    return tokenizer.build(tmp_path_factory.mktemp("tokenizer"))


def test_every_caption_word_is_one_token(words: CLIPTokenizer) -> None:
    assert [word for word in vocabulary() if len(words.tokenize(word)) != 1] == []


def test_any_text_has_tokens_and_comes_back(words: CLIPTokenizer) -> None:
    text = "two héllo 🦊 zebras?"
    ids = words(text).input_ids
    assert (ids[0], ids[-1]) == (words.bos_token_id, words.eos_token_id)
    assert words.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")


def test_prompts_are_padded_to_77_like_stable_diffusions(words: CLIPTokenizer) -> None:
    ids = words("a fox", padding="max_length", return_tensors="pt").input_ids
    assert ids.shape == (1, 77)
    assert ids[0, -1] == words.eos_token_id == len(words) - 1


def test_building_twice_gives_the_same_ids(words: CLIPTokenizer, tmp_path: Path) -> None:
    assert tokenizer.build(tmp_path).get_vocab() == words.get_vocab()
