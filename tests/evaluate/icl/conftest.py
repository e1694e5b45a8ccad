"""One tokenizer and one model for all tests of the native engine."""

import pytest
from icl_setup import tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def model():
    return tiny_model()
