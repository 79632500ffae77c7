"""The contract and the code say the same: reasons, numbers, packages, what is redacted."""

import re
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor

from authsvc.errors import RULES, Code
from authsvc.model import AuthMethod, ClientState, GrantType, TokenFormat
from authsvc.rpc.policy import rule_of
from authsvc.rpc.server import FILES, SERVICES
from authsvc.rpc.status import CODES
from authsvc_client.core.markers import MarkerKind
from authsvc_client.core.reason import Reason
from authsvc_client.v1 import (
    annotations_pb2,
    auth_pb2,
    clients_pb2,
    error_reason_pb2,
    resources_pb2,
)

PROTOS = Path(__file__).parents[1] / "protos" / "authsvc" / "v1"
ALL_FILES = (*FILES, annotations_pb2.DESCRIPTOR, error_reason_pb2.DESCRIPTOR)


def _names(enum: EnumDescriptor, prefix: str) -> dict[str, int]:
    assert all(value.name.startswith(prefix) for value in enum.values)
    return {value.name.removeprefix(prefix): value.number for value in enum.values}


@pytest.mark.parametrize(
    ("ours", "theirs", "prefix"),
    [
        (Reason, error_reason_pb2.ErrorReason, "ERROR_REASON_"),
        (MarkerKind, auth_pb2.MarkerKind, "MARKER_KIND_"),
        (ClientState, clients_pb2.ClientState, "CLIENT_STATE_"),
        (AuthMethod, clients_pb2.ClientAuthMethod, "CLIENT_AUTH_METHOD_"),
        (GrantType, clients_pb2.GrantType, "GRANT_TYPE_"),
        (TokenFormat, resources_pb2.TokenFormat, "TOKEN_FORMAT_"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_numbers_are_the_contracts(ours: type[IntEnum], theirs: Any, prefix: str) -> None:
    expected = _names(theirs.DESCRIPTOR, prefix)
    assert expected.pop("UNSPECIFIED") == 0
    found = {member.name: int(member) for member in ours}
    found.pop("UNSPECIFIED", None)
    assert found == expected


# --- reasons ---

_REASON = re.compile(
    r"((?:  // .*\n)+)  ERROR_REASON_(\w+) = (\d+)( \[deprecated = true\])?;", re.MULTILINE
)


def _documented() -> dict[str, str]:
    """Reason -> its comment, on one line."""
    text = (PROTOS / "error_reason.proto").read_text()
    return {
        name: " ".join(line.strip().removeprefix("// ") for line in comment.splitlines())
        for comment, name, _, _ in _REASON.findall(text)
    }


DOCUMENTED = _documented()
_CODE_NAMES = {code.name for code in Code}


def _codes(comment: str) -> set[str]:
    """The codes that a reason is sent with; none for what is only a verdict."""
    first = comment.partition(".")[0]
    return {word for word in re.findall(r"[A-Z_]{5,}", first) if word in _CODE_NAMES}


def test_every_reason_is_documented() -> None:
    assert DOCUMENTED.keys() == {reason.name for reason in Reason}


@pytest.mark.parametrize("reason", [r for r in Reason if r], ids=lambda r: r.name)
def test_reason_has_the_code_and_the_oauth_error_that_its_comment_says(reason: Reason) -> None:
    comment = DOCUMENTED[reason.name]
    codes, rule = _codes(comment), RULES.get(reason)
    is_verdict = comment.startswith("Verdict")
    if rule is None:
        assert is_verdict or reason is Reason.TOKEN_INACTIVE
        return
    assert codes == {rule.code.name}
    said = re.findall(r"\b(?:invalid|unauthorized|insufficient|use)_[a-z_]+\b", comment)
    for oauth in said[:1]:
        assert rule.oauth == oauth
    assert rule.text
    assert rule.text[0].islower()


def test_reasons_are_verdicts_or_have_a_rule() -> None:
    without = {reason.name for reason in Reason if reason not in RULES}
    verdicts = {name for name, text in DOCUMENTED.items() if text.startswith("Verdict.")}
    assert without == verdicts | {"UNSPECIFIED", "TOKEN_INACTIVE"}


def test_names_of_reasons_are_short_enough() -> None:
    """AIP-193: UPPER_SNAKE of at most 63 characters."""
    for reason in Reason:
        assert re.fullmatch(r"[A-Z][A-Z0-9_]{1,61}[A-Z0-9]", reason.name)


def test_codes_are_grpcs() -> None:
    for code in Code:
        assert CODES[code.value].name == code.name


def test_reasons_that_methods_document_exist() -> None:
    for file in PROTOS.glob("*.proto"):
        for comment, _ in re.findall(r"((?:  // .*\n)+)  rpc (\w+)", file.read_text()):
            text = " ".join(line.strip().removeprefix("// ") for line in comment.splitlines())
            _, found, listed = text.partition("Reasons: ")
            if found:
                names = set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b", listed))
                assert names <= DOCUMENTED.keys(), names - DOCUMENTED.keys()


# --- files ---


def test_option_has_its_number() -> None:
    assert annotations_pb2.require.number == 50743
    assert annotations_pb2.require.full_name == "authsvc.v1.require"


@pytest.mark.parametrize("file", ALL_FILES, ids=lambda file: file.name)
def test_packages_and_languages(file: Any) -> None:
    assert file.package == "authsvc.v1"
    options = file.GetOptions()
    assert options.go_package == "authsvc/v1;authsvcv1"
    assert options.java_package == "authsvc.v1"
    assert options.java_multiple_files
    assert {d.name.rpartition("/")[0] for d in file.dependencies} <= {
        "authsvc/v1",
        "google/protobuf",
    }
    assert len(file.services_by_name) <= 1


def test_every_file_of_the_contract_is_served_or_has_no_service() -> None:
    names = {f"authsvc/v1/{file.name}" for file in PROTOS.glob("*.proto")}
    assert names == {file.name for file in ALL_FILES}


@pytest.mark.parametrize("service", SERVICES, ids=lambda service: service.name)
def test_every_method_has_a_rule_and_messages_of_its_own(service: Any) -> None:
    for method in service.methods:
        rule_of(method)
        assert method.input_type.name == f"{method.name}Request"
        assert method.output_type.name == f"{method.name}Response"


def _messages() -> list[Descriptor]:
    return [message for file in ALL_FILES for message in file.message_types_by_name.values()]


SECRETS = re.compile(
    r"(password|secret|assertion|access_token|refresh_token|registration_access_token"
    r"|initial_access_token|subject_token|actor_token|^token|^code|code_verifier|device_code"
    r"|^value)$"
)
NO_SECRETS = {
    # A message of its own, without the value.
    "CreateInitialAccessTokenRequest.initial_access_token",
    "CreateInitialAccessTokenResponse.initial_access_token",
    # Not text: a list of credentials' kinds, a token of a list, a number.
    "IssueTokenResponse.token",
    "RefreshTokenResponse.token",
    "ItemError.code",
}


def _is_text(field: FieldDescriptor) -> bool:
    return field.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)


@pytest.mark.parametrize("message", _messages(), ids=lambda message: message.name)
def test_what_looks_like_a_secret_is_redacted(message: Descriptor) -> None:
    for field in message.fields:
        key = f"{message.name}.{field.name}"
        redacted = field.GetOptions().debug_redact
        if SECRETS.search(field.name) and _is_text(field) and key not in NO_SECRETS:
            assert redacted, key
        if redacted:
            assert _is_text(field), key


def test_redacted_fields_are_the_ones_that_carry_secrets() -> None:
    """The other way round: a new one must be looked at."""
    redacted = {
        f"{message.name}.{field.name}"
        for message in _messages()
        for field in message.fields
        if field.GetOptions().debug_redact
    }
    assert len(redacted) >= 20
    assert redacted >= {
        "ClientCredential.client_secret",
        "ClientCredential.client_assertion",
        "IssuedToken.access_token",
        "IssuedToken.refresh_token",
        "ValidateTokenRequest.token",
        "RevokeTokenRequest.token",
        "RegisterClientResponse.client_secret",
        "RegisterClientResponse.registration_access_token",
    }


def test_ids_are_text_and_times_are_times() -> None:
    numbers = {FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_INT64, FieldDescriptor.TYPE_UINT64}
    for message in _messages():
        for field in message.fields:
            if field.name.endswith("_id"):
                assert field.type == FieldDescriptor.TYPE_STRING, field.full_name
            if field.name.endswith("_time") and field.name != "check_time":
                assert field.message_type is not None, field.full_name
            assert not (field.name.endswith(("_seconds", "_ttl")) and field.type in numbers)


def test_enums_begin_unspecified() -> None:
    for file in ALL_FILES:
        proto = descriptor_pb2.FileDescriptorProto()
        file.CopyToProto(proto)
        for enum in proto.enum_type:
            assert enum.value[0].number == 0
            assert enum.value[0].name.endswith("_UNSPECIFIED")


def test_comment_beside_every_method_says_who_may_call() -> None:
    """buf asks for a comment; this asks for what design section 3 wants in it."""
    who = re.compile(
        r"Who may call|Administrators|Anyone|client|bearer|peer|user|person|admin", re.IGNORECASE
    )
    for file in PROTOS.glob("*.proto"):
        methods = re.findall(r"((?:  // .*\n)+)  rpc (\w+)", file.read_text())
        for comment, name in methods:
            assert who.search(comment), name
