import pytest


@pytest.fixture(params=["plain", "chat"])
def tokenizer(request, make_tokenizer):
    return make_tokenizer(chat=request.param == "chat")
