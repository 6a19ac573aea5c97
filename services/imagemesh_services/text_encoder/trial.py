"""What text encoders are measured by: a prompt and a negative one."""

from collections.abc import Callable

import numpy as np

from imagemesh_services.text_encoder.backend import PromptModel, TextModel

_TEXTS = ("a red apple on a wooden table", "")


def trial(model: TextModel | PromptModel, width: int, height: int) -> Callable[[], object]:
    """The work; the picture's size is nothing to it."""
    if isinstance(model, PromptModel):
        return lambda: model.encode_prompts(_TEXTS, 0)
    windows = np.concatenate([model.tokenize(text).windows for text in _TEXTS])
    return lambda: model.encode(windows, 0)
