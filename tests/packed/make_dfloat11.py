"""Weights as DFloat11 codes them; kept as those of `make.py` are.

    pip install --no-deps dfloat11==0.5.0 dahuffman==0.4.2
    python tests/packed/make_dfloat11.py

writes `dfloat11.safetensors` beside itself: three Linears' numbers coded together, and `values`, which they were.
"""

from __future__ import annotations

from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent


def main() -> None:
    package = find_spec("dfloat11")  # which itself wants a GPU: of it just the encoder
    assert package is not None and package.origin is not None
    spec = spec_from_file_location("encoder", Path(package.origin).with_name("dfloat11_utils.py"))
    assert spec is not None and spec.loader is not None
    encoder = module_from_spec(spec)
    spec.loader.exec_module(encoder)
    torch.manual_seed(0)
    weights = [(torch.randn(count) * by).bfloat16() for count, by in ((4000, 0.02), (901, 1.0), (3000, 0.3))]
    weights[0][5] = 1e-30
    weights[1][::17] *= 1e-9
    weights[2][::999] = 0
    _, counts = encoder.get_codec(torch.cat(weights))
    codec, _, table = encoder.get_32bit_codec(counts)
    exponents, rest, positions, gaps, split = encoder.encode_weights(weights, codec, 8, 512)
    found = {"encoded_exponent": exponents, "sign_mantissa": rest, "gaps": gaps, "split_positions": split}
    found |= {"luts": encoder.get_luts(table), "output_positions": positions.view(torch.uint8)}
    found["values"] = torch.cat(weights)
    save_file({name: each.contiguous().clone() for name, each in found.items()}, HERE / "dfloat11.safetensors")


if __name__ == "__main__":
    main()
