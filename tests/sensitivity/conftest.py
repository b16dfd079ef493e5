from __future__ import annotations

import pytest
from torch import nn

from .subjects import trained_classifier, trained_llama


@pytest.fixture(scope="module")
def classifier() -> nn.Module:
    return trained_classifier()


@pytest.fixture(scope="module")
def language_model() -> nn.Module:
    return trained_llama()
