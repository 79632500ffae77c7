"""Users out of a CSV file: what is read of it, and what reaches a server."""

import io
from itertools import cycle, islice
from typing import Any, Final

import pytest

from authsvc.cli.output import Failure
from authsvc.cli.user_import import FIELD_CHARS_MAX, LINE_BYTES_MAX, Refusal, Row, read

HEAD: Final = "username,display_name,email,password\n"


def rows(text: str | bytes) -> list[Row | Refusal]:
    raw = text.encode() if isinstance(text, str) else text
    return list(read(io.BytesIO(raw), "users.csv"))


def refusal(text: str | bytes) -> Refusal:
    (found,) = (each for each in rows(text) if isinstance(each, Refusal))
    return found


def test_columns_come_in_any_order_and_most_may_be_missing() -> None:
    assert rows(" email , username\r\na@b.test,ada\r\n,bob\r\n") == [
        Row(2, {"email": "a@b.test", "username": "ada"}),
        Row(3, {"email": "", "username": "bob"}),
    ]


def test_mark_of_utf_8_is_no_part_of_the_first_column() -> None:
    assert rows(b"\xef\xbb\xbfusername\nada\n") == [Row(2, {"username": "ada"})]


def test_fields_are_taken_as_they_are() -> None:
    (row,) = rows(HEAD + '"Größe","a ""b""\nc",,"  spaces, and commas "\n')
    assert isinstance(row, Row)
    assert list(row.fields.values()) == ["Größe", 'a "b"\nc', "", "  spaces, and commas "]


def test_line_of_a_row_is_its_first() -> None:
    found = rows('username,display_name\n\nada,"two\nlines"\n\n\nbob,\n')
    assert [each.line for each in found] == [3, 7]


@pytest.mark.parametrize(
    ("head", "text"),
    [
        ("", "unknown column: ada"),
        ("\n", "no column username"),
        ("email\n", "no column username"),
        ("username,role\n", "unknown column: role"),
        ("username,\n", "unknown column"),
        ("Username\n", "unknown column: Username"),
        ("username,email,username\n", "twice"),
        ("username,\xff\n", "unknown column"),
        ('"username\n', "line 1"),
    ],
)
def test_wrong_head_fails_before_any_row(head: str, text: str) -> None:
    with pytest.raises(Failure, match=text):
        read(io.BytesIO(head.encode("latin-1") + b"ada\n"), "users.csv")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b",Ada,,", "username is empty"),
        (b"ada,Ada", "it has 2 fields, the first line 4"),
        (b"ada,Ada,,,secret", "it has 5 fields, the first line 4"),
        (b"ada,\xff,,", "display_name is no UTF-8"),
        (b"\xff,,,", "username is no UTF-8"),
        (b"ada,,," + b"x" * (FIELD_CHARS_MAX + 1), f"password is longer than {FIELD_CHARS_MAX}"),
    ],
)
def test_wrong_line_is_refused_alone(line: bytes, message: str) -> None:
    found = rows(HEAD.encode() + b"x,,,\n" + line + b"\ny,,,\n")
    assert [type(each) for each in found] == [Row, Refusal, Row]
    wrong = found[1]
    assert isinstance(wrong, Refusal)
    assert (wrong.line, wrong.reason, wrong.message) == (3, "FIELD_INVALID", message)
    wrong.username.encode()


def test_second_row_of_a_username_is_refused() -> None:
    assert refusal("username\nAda\nbob\nada\n") == Refusal(
        4, "ada", "ALREADY_EXISTS", "the username is that of line 2"
    )


@pytest.mark.parametrize(
    ("broken", "line"),
    [('bob,"x"y,,\n', 3), ('bob,"open\nand never shut\n', 3), ("x" * 200_000, 3)],
)
def test_what_is_no_csv_ends_the_file_and_names_its_line(broken: str, line: int) -> None:
    found = read(io.BytesIO((HEAD + "ada,,,\n" + broken).encode()), "users.csv")
    assert isinstance(next(found), Row)
    with pytest.raises(Failure, match=rf"users\.csv: line {line}"):
        next(found)


class Endless(io.RawIOBase):
    """More than any machine holds; counts what was taken of it."""

    def __init__(self, line: bytes) -> None:
        self._lines = cycle(line)
        self.taken = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        buffer[:] = bytes(islice(self._lines, len(buffer)))
        self.taken += len(buffer)
        return len(buffer)


def test_file_is_read_as_it_is_needed() -> None:
    source = Endless(b"username\n")
    found = read(io.BufferedReader(source), "users.csv")
    assert [next(found).line for _ in range(3)] == [2, 3, 4]
    assert source.taken < LINE_BYTES_MAX
    source = Endless(b"username,")
    with pytest.raises(Failure, match="line 1 is too long"):
        read(io.BufferedReader(source), "users.csv")
    assert source.taken <= LINE_BYTES_MAX + io.DEFAULT_BUFFER_SIZE


def test_row_is_shown_without_its_password() -> None:
    (row,) = rows(HEAD + "ada,,,correct horse\n")
    assert "correct horse" not in repr(row)
