"""Block types: expanded bit for bit as the gguf package does, and packed with less error than it and than ggml."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from lanting.nn.blocks import TYPES
from lanting.nn.dequant import EXPAND, dequantize
from lanting.weights.kquants import PACKERS, can_quantize, quantize

COUNTED = [kind for kind in EXPAND if kind != "F64"]  # the package gives float32 only
HALVES = {  # where a block's float16 numbers lie
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,), "IQ1_S": (0,), "IQ2_XXS": (0,),
    "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,), "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip
GGML = {  # relative error of ggml's own reference quantizers on the two matrices of `weights`, measured once
    "Q8_0": (0.00536, 0.00748),
    "Q4_0": (0.08590, 0.11513),
    "Q5_0": (0.04274, 0.05805),
    "Q4_1": (0.07816, 0.09407),
    "Q5_1": (0.03785, 0.04595),
    "Q2_K": (0.30283, 0.35596),
    "Q3_K": (0.15163, 0.18331),
    "Q4_K": (0.07215, 0.08883),
    "Q5_K": (0.03851, 0.05031),
    "Q6_K": (0.01786, 0.02333),
}


def random_blocks(kind: str, rows: int = 64, blocks: int = 4) -> np.ndarray:
    """Random bytes (rows, bytes) whose scales are numbers."""
    dice = np.random.default_rng(TYPES[kind].code)
    raw = dice.integers(0, 256, (rows * blocks, TYPES[kind].size), dtype=np.uint8)
    for place in HALVES.get(kind, ()):
        scale = (dice.standard_normal(len(raw)) * 10.0 ** dice.integers(-6, 3, len(raw))).astype(np.float16)
        raw[:, place : place + 2] = scale.view(np.uint8).reshape(-1, 2)
    return raw.reshape(rows, -1)


def weights(name: str) -> np.ndarray:
    dice = np.random.default_rng(0)
    plain = dice.standard_normal((256, 2048)).astype(np.float32) * 0.02
    return plain if name == "normal" else (dice.standard_t(4, (256, 2048)) * 0.02).astype(np.float32)


def block_errors(x: np.ndarray, packed: np.ndarray, kind: str) -> np.ndarray:
    """Squared error of each block of 32."""
    back = dequantize(torch.from_numpy(packed), kind).numpy().astype(np.float64)
    return np.square(back - x).reshape(-1, 32).sum(1)


def relative_error(x: np.ndarray, packed: np.ndarray, kind: str) -> float:
    """Root of the mean squared error over the root of the mean square."""
    back = dequantize(torch.from_numpy(packed), kind).numpy().astype(np.float64)
    return float(np.sqrt(np.square(back - x).mean() / np.square(x.astype(np.float64)).mean()))


def test_every_type_the_package_reads_is_known():
    theirs = {kind.name for kind in quants._type_traits} | {"F32", "F16"}
    assert theirs <= set(COUNTED)
    for kind in COUNTED:
        assert gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]] == (TYPES[kind].values, TYPES[kind].size)
        assert GGMLQuantizationType[kind] == TYPES[kind].code


@pytest.mark.parametrize("kind", COUNTED)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_blocks_expand_as_the_package_expands_them(kind: str):
    raw = random_blocks(kind)
    ours = dequantize(torch.from_numpy(raw), kind).numpy()
    theirs = quants.dequantize(raw, GGMLQuantizationType[kind])
    assert ours.shape == theirs.shape
    same = (ours.view(np.uint32) == theirs.view(np.uint32)) | (np.isnan(ours) & np.isnan(theirs))
    assert same.all()
    if kind in HALVES:
        assert np.isfinite(ours).all()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4"])
def test_what_the_package_packs_comes_back_the_same(kind: str):
    x = weights("normal")[:32]
    try:
        packed = quants.quantize(x, GGMLQuantizationType[kind])
    except NotImplementedError:
        packed = random_blocks(kind)
    ours = dequantize(torch.from_numpy(packed), kind).numpy()
    assert np.array_equal(ours.view(np.uint32), quants.dequantize(packed, GGMLQuantizationType[kind]).view(np.uint32))


def test_other_types_are_rounded_once():
    raw = torch.from_numpy(random_blocks("Q4_K", rows=700, blocks=8))  # several runs of rows
    whole = dequantize(raw, "Q4_K")
    assert torch.equal(dequantize(raw, "Q4_K", torch.bfloat16), whole.bfloat16())
    assert torch.equal(dequantize(raw[5:9], "Q4_K"), whole[5:9])
    assert dequantize(raw[:0], "Q4_K").shape == (0, 2048)


def test_what_is_no_block_is_refused():
    with pytest.raises(ValueError, match="stands for floats"):
        dequantize(torch.zeros(1, 8, dtype=torch.uint8), "I32")
    with pytest.raises(ValueError, match="no rows of Q4_K"):
        dequantize(torch.zeros(1, 143, dtype=torch.uint8), "Q4_K")
    with pytest.raises(ValueError, match="no rows of Q4_K"):
        dequantize(torch.zeros(1, 144), "Q4_K")
    assert "IQ4_XS" in EXPAND and "I8" not in EXPAND


@pytest.mark.parametrize("kind", PACKERS)
@pytest.mark.parametrize("place", [0, 1], ids=["normal", "heavy tails"])
def test_our_error_is_below_ggmls(kind: str, place: int):
    x = weights(("normal", "tails")[place])
    ours = relative_error(x, quantize(torch.from_numpy(x), kind).numpy(), kind)
    assert ours < 0.985 * GGML[kind][place]
    if kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"):
        theirs = relative_error(x, quants.quantize(x, GGMLQuantizationType[kind]), kind)
        assert theirs == pytest.approx(GGML[kind][place], abs=2e-5)  # the package and ggml are one method


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q8_0"])
def test_no_block_is_worse_than_the_packages(kind: str):
    """Not only on average: the largest loss of a block against the package's, of 16,384 blocks."""
    x = weights("tails")
    ours = block_errors(x, quantize(torch.from_numpy(x), kind).numpy(), kind)
    theirs = block_errors(x, quants.quantize(x, GGMLQuantizationType[kind]), kind)
    assert (ours <= theirs * 1.0001 + 1e-12).mean() > 0.995
    assert (ours / theirs).max() < 1.1


@pytest.mark.parametrize("kind", PACKERS)
def test_odd_weights_survive(kind: str):
    """Zeros, constants, one-sided rows, single outliers, tiny and huge values."""
    size = TYPES[kind].values
    rows = torch.zeros(9, size)
    rows[1], rows[2], rows[3] = 0.25, -0.25, torch.linspace(0.5, 1.0, size)
    rows[4] = -rows[3]
    rows[5, 3], rows[6, 3] = 7.0, -7.0
    rows[7] = torch.randn(size, generator=torch.Generator().manual_seed(0)) * 1e-6
    rows[8] = torch.linspace(-3e4, 3e4, size)
    back = dequantize(quantize(rows, kind), kind)
    assert torch.isfinite(back).all() and torch.equal(back[0], rows[0])
    steps = {"Q2_K": 4, "Q3_K": 8, "Q4_0": 16, "Q4_1": 16, "Q4_K": 16}.get(kind, 30)
    spread = rows.amax(1, True).clamp(min=0) - rows.amin(1, True).clamp(max=0)
    errors = ((back - rows).abs() / spread.clamp(min=1e-9)).amax(1)
    assert errors[7] < 0.2  # float16 scales end at 6e-8; ggml's method loses such rows wholly
    assert (torch.cat([errors[:7], errors[8:]]) < 1.05 / (steps - 1)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_come_in_any_float(dtype: torch.dtype):
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(quantize(x, "Q6_K"), quantize(x.float(), "Q6_K"))


def test_what_can_not_be_packed_is_refused():
    with pytest.raises(ValueError, match="no whole number"):
        quantize(torch.zeros(2, 100), "Q4_K")
    with pytest.raises(ValueError, match="not finite"):
        quantize(torch.tensor([[float("nan")] * 32]), "Q8_0")
    with pytest.raises(ValueError, match="no type we can"):
        quantize(torch.zeros(1, 256), "IQ4_XS")
    assert can_quantize("Q4_K") and not can_quantize("IQ2_S")


def test_q8_0_never_uses_its_lowest_code():
    packed = quantize(torch.from_numpy(weights("tails")), "Q8_0").numpy().reshape(-1, 34)
    assert packed[:, 2:].view(np.int8).min() == -127
    assert (packed[:, :2].copy().view(np.float16) >= 0).all()
