"""Networks of different models in one folder are told apart before anything is read."""

from __future__ import annotations

import pytest

from lanting import Engine
from lanting.core.errors import ModelError
from lanting.core.lang import chinese
from lanting.specs.detect import SINGLE_STREAM
from lanting.weights.find import locate
from lanting.weights.fits import check_fits

FIRST = {"transformer": {"joint_attention_dim": 32}, "text_encoder": {"hidden_size": 32}, "vae": {"z_dim": 16}}
SECOND = {
    "transformer": {"_class_name": SINGLE_STREAM, "context_in_dim": 32, "in_channels": 64, "patch_size": 1},
    "text_encoder": {"model_type": "qwen3_vl", "text_config": {"hidden_size": 32}},
    "vae": {"z_dim": 64},
}


@pytest.mark.parametrize("configs", [FIRST, SECOND])
def test_what_belongs_together(configs):
    check_fits(configs)


def test_nano_does():
    check_fits(locate("nano").configs)
    Engine.open("nano").close()


@pytest.mark.parametrize(
    ("base", "part", "word"),
    [
        (FIRST, {"text_encoder": SECOND["text_encoder"]}, "is a Qwen3-VL, and this transformer reads with Qwen2.5-VL"),
        (SECOND, {"text_encoder": FIRST["text_encoder"]}, "is a Qwen2.5-VL, and this transformer reads with Qwen3-VL"),
        (FIRST, {"text_encoder": {"text_config": {"hidden_size": 2048}}}, "states have 2048 numbers"),
        (FIRST, {"text_encoder": {}}, "states have 3584 numbers, and the transformer reads 32"),
        (FIRST, {"vae": SECOND["vae"]}, "has 64 channels where the transformer wants 16"),
        (SECOND, {"vae": FIRST["vae"]}, "has 16 channels where the transformer wants 64"),
    ],
)
def test_what_does_not(base, part, word):
    with pytest.raises(ModelError, match=word) as caught:
        check_fits({**base, **part})
    assert caught.value.sentence in chinese()
