"""A release is a text file; `settle` fills a request from it; `detect` tells which release a folder holds."""

from lanting.specs.detect import detect
from lanting.specs.model_spec import (
    Defaults,
    ModelSpec,
    distilled_releases,
    get_spec,
    read_spec,
    release_in,
    spec_names,
    whole_release,
)
from lanting.specs.settle import settle
from lanting.specs.sizes import fit_area, parse_size

__all__ = [
    "Defaults",
    "ModelSpec",
    "detect",
    "distilled_releases",
    "fit_area",
    "get_spec",
    "parse_size",
    "read_spec",
    "release_in",
    "settle",
    "spec_names",
    "whole_release",
]
