"""What surrounds a token is decoded once: a request is read as protobuf reads the whole of it,
whatever came before, and however it is written."""

import inspect
import textwrap
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from authsvc.errors import AuthError
from authsvc.rpc import answers
from authsvc.rpc.answers import Questions
from authsvc.rpc.convert import Terms
from authsvc.rpc.limits import Shape
from authsvc_client.v1 import auth_pb2

AUDIENCES = frozenset({"https://a.test"})
_shape = Shape(auth_pb2.ValidateTokenRequest.DESCRIPTOR)


def _varint(number: int, size: int = 0) -> bytes:
    """With `size`, in more bytes than it takes."""
    found = bytearray()
    while number > 0x7F or len(found) < size - 1:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*found, number))


def _field(number: int, content: bytes, size: int = 0) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content), size) + content


def _token(text: str, size: int = 0) -> bytes:
    return _field(1, text.encode(), size)


def _message(**fields: Any) -> bytes:
    return auth_pb2.ValidateTokenRequest(**fields).SerializeToString()


TOKENS = st.sampled_from(["a", "b", "", "\u00e9" * 70, "c" * 127, "d" * 128, "e" * 20_000])
PIECES = st.one_of(
    st.builds(_token, TOKENS, st.integers(0, 4)),
    st.sampled_from(
        [
            _message(audience="https://a.test"),
            _message(audience="https://b.test", required_scopes=["x", "y"]),
            _message(view=auth_pb2.TOKEN_VIEW_FULL, require_bound=True),
            _message(presenter={"certificate_thumbprint": "A" * 43}),
            _message(consistency={"at_least": 7}),
            _message(consistency={"strong": {}}),
            _message(audience="x" * 600),  # too long
            _field(99, b"new"),
            _field(1, b"\xff"),  # no UTF-8
            b"\x08\x01",  # the token's number, and another type
            b"\x0a",
            b"\x0a\x05ab",  # cut off
            b"\x0b\x0c",  # a group
        ]
    ),
    st.binary(max_size=4),
)


def _plainly(raw: bytes) -> Any:
    """As without anything kept."""
    try:
        request = auth_pb2.ValidateTokenRequest.FromString(raw)
        _shape.check(request)
        return request.token, _told(Terms(request))
    except (AuthError, DecodeError) as error:
        return type(error), getattr(error, "reason", None)


def _read(questions: Questions, raw: bytes) -> Any:
    try:
        asked = questions.one(raw)
    except (AuthError, DecodeError) as error:
        return type(error), getattr(error, "reason", None)
    assert asked.raw == raw
    return asked.token, _told(asked.terms)


def _told(terms: Terms) -> Any:
    return terms.by(AUDIENCES), terms.view, terms.full, terms.at_least, terms.strong


@given(st.lists(st.lists(PIECES, max_size=4), max_size=4), st.lists(PIECES, max_size=5))
@example([[_token("a"), _token("b")]], [_token("c"), _token("b")])
@example([[_token("a"), _token("")]], [_token("c"), _token("")])
@example([[_token("a"), _message(view=2)]], [_token("b"), _message(view=2)])
def test_request_is_read_as_protobuf_reads_the_whole_of_it(
    before: list[list[bytes]], pieces: list[bytes]
) -> None:
    questions = Questions()
    for each in (*before, pieces):
        raw = b"".join(each)
        with_others = [raw, _token("other") + b"".join(each[1:]), raw]
        for one in with_others:
            assert _read(questions, one) == _plainly(one)


def test_second_token_that_nobody_looks_for_would_be_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right, wrong = "not auth_pb2.ValidateTokenRequest.FromString(rest).token", "True"
    source = textwrap.dedent(inspect.getsource(Questions.one))
    assert source.count(right) == 1
    made: dict[str, Any] = {}
    exec(source.replace(right, wrong), vars(answers), made)
    monkeypatch.setattr(Questions, "one", made["one"])
    with pytest.raises(AssertionError):
        test_request_is_read_as_protobuf_reads_the_whole_of_it()


def test_tokens_with_the_same_surroundings_share_them() -> None:
    questions = Questions()
    rest = _message(audience="https://a.test", view=auth_pb2.TOKEN_VIEW_CLAIMS)
    first, second = (questions.one(_token(token) + rest) for token in ("a", "b"))
    assert first.terms is second.terms
    assert second.request == auth_pb2.ValidateTokenRequest.FromString(_token("b") + rest)
