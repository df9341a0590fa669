import pytest

from hma_serve.core.error_detail import error_detail, from_error_detail
from hma_serve.core.errors import ERRORS, HmaError, Internal


@pytest.mark.parametrize("kind", ERRORS.values(), ids=ERRORS.keys())
@pytest.mark.parametrize("retry_after", [None, 0.0, 1.5])
def test_every_typed_error_comes_back_whole(kind: type[HmaError], retry_after: float | None) -> None:
    error = from_error_detail(error_detail(kind("do this", field="max_tokens", retry_after=retry_after)))
    assert type(error) is kind
    assert (error.message, error.field, error.retry_after) == ("do this", "max_tokens", retry_after)


def test_a_text_without_end_is_cut() -> None:
    assert error_detail(Internal("x" * 5_000)).message == "x" * 2_000
