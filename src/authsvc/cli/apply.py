"""The command that makes a server what files declare: apply."""

import os
import re
import sys
import tempfile
from collections.abc import Sequence
from copy import copy
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from authsvc.apply import (
    ENDS,
    FIELDS,
    PENDING,
    SETS,
    Change,
    ClientKey,
    Difference,
    Kind,
    Plan,
    Refused,
    Step,
    Type,
    Value,
    Verb,
    needs_secret,
    permission_name,
    plan,
)
from authsvc.cli.calls import Session, connected
from authsvc.cli.declared import ENUMS, WIRE_NAMES, enum_of, read, written
from authsvc.cli.export import current
from authsvc.cli.output import Exit, Failure, Output, command, explained

# What is heavy is imported where it is used: `--help` does not wait for it.
CHANGES: Final = 2
"""Exit code of --dry-run where there is something to do."""
SHOWN: Final = 20
"""Most of what is not listed, of a kind."""
COMMENT: Final = "authsvc apply"
_MEANWHILE: Final = frozenset({"ETAG_MISMATCH", "ALREADY_EXISTS", "CLIENT_STATE_CONFLICT"})


def register(app: typer.Typer) -> None:
    """Adds the command to the root."""
    command(app, connected, name="apply")(apply)


def apply(
    session: Session,
    file: Annotated[
        Path,
        typer.Option(
            "--file", "-f", metavar="DIR", help="Directory with *.yaml or *.yml, or one such file."
        ),
    ],
    yes: Annotated[bool, typer.Option("--yes", help="Apply without asking.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Tell the difference alone: exit code 0 if there is none, else 2."
        ),
    ] = False,
    secrets_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where the secret (NAME-CLIENT_ID.secret) and the registration access token"
            " (….token) of each new client go, in files that only you can read; else nobody gets"
            " them.",
        ),
    ] = None,
) -> None:
    """Make resources, permissions, clients, roles and assignments what files declare.

    It tells the difference, asks, and makes it; what is not listed is told, and never deleted. A
    field that is left out has its default. A run that was stopped is finished by running again.
    """
    out = session.out
    if out.json and not (yes or dry_run):
        raise Failure("--json asks nobody", "add --yes, or --dry-run")
    try:
        found = _plan(session, file)
    except Refused as refused:
        number = len(refused.problems)
        text = f"{number} problem{'s' if number > 1 else ''}, nothing was changed"
        raise _failed(text, violations=refused.problems) from refused
    document = {
        "changes": [asdict(change) for change in found.changes],
        "left": [asdict(left) for left in found.left],
        "not_listed": [{"kind": kind, "name": name} for kind, name in found.not_listed],
    }
    if not out.json:
        _tell(out, found)
    needy = next((step.name for step in found.steps if _makes_secret(step)), "")
    if dry_run:
        if needy and secrets_dir is None:
            out.note(f"to apply it: --secrets-dir, for the secret of {needy}")
        if out.json:
            out.document({**document, "applied": 0})
        raise typer.Exit(CHANGES if found.steps else Exit.OK)
    if needy and secrets_dir is None:
        text = f"client {needy} needs a secret, and nobody would get it"
        raise _failed(text, "--secrets-dir DIR puts it into a file there")
    if found.steps and not yes:
        if not sys.stdin.isatty():
            raise _failed("nobody is there to be asked", "--yes applies without asking")
        if not typer.confirm("Apply?", err=True):
            raise _failed("not applied: nothing was changed")
    if secrets_dir is not None:
        secrets_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    _Execution(session, found, secrets_dir).run()
    if out.json:
        out.document({**document, "applied": len(found.steps)})
    elif found.steps:
        out.note(f"applied: {_summary(found.changes, 'created', 'changed')}", "green")


def _plan(session: Session, file: Path) -> Plan:
    """Raises Refused."""
    declared = read(file)
    there = current(
        session, {str(each.fields["user"]) for each in declared if "user" in each.fields}
    )
    if any(each.state == PENDING for each in there.clients):
        there = replace(there, me=_me(session))
    return plan(declared, there)


def _me(session: Session) -> str:
    """What the server calls who calls: the registrant of a client that is not registered."""
    from authsvc_client.v1 import auth_pb2, clients_pb2
    from authsvc_client.v1.auth_pb2_grpc import AuthServiceStub

    metadata = clients_pb2.ClientMetadata(client_name=COMMENT)
    request = auth_pb2.RegisterClientRequest(metadata=metadata, validate_only=True)
    method = AuthServiceStub(session.channel).RegisterClient
    registrant: str = session.call(method, request).client.registrant
    return registrant


def _failed(message: str, hint: str = "", **more: Any) -> Failure:
    """Ends with 1: --dry-run has another meaning for USAGE."""
    failure = Failure(message, hint, code="FAILED_PRECONDITION", **more)
    failure.exit = Exit.FAILED
    return failure


def _makes_secret(step: Step) -> bool:
    if step.verb is Verb.RENEW_SECRET:
        return True
    return (step.verb, step.kind) == (Verb.CREATE, Kind.CLIENT) and needs_secret(step.fields)


# --- the difference ---


def _tell(out: Output, found: Plan) -> None:
    """To a person."""
    for change in found.changes:
        sign, style = ("+", "green") if change.is_new else ("~", "yellow")
        note = f"  ({'; '.join(change.notes)})" if change.notes else ""
        out.title(f"{sign} {change.kind:<10}  {change.name}{note}", style)
        for each in change.fields:
            out.title(f"      {each.field}: {_told(change, each)}", "")
    for left in found.left:
        out.title(f"! {left.kind:<10}  {left.name}: {left.text}", "red")
    if found.not_listed:
        out.title("not listed, left alone:", "dim")
    for kind, group in groupby(found.not_listed, key=lambda each: each[0]):
        names = [name for _, name in group]
        more = [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
        for name in names[:SHOWN] + more:
            out.title(f"  {kind:<10}  {name}", "dim")
    if found.steps:
        out.note(_summary(found.changes, "to create", "to change"))
    else:
        out.note("nothing to do" + (", but for what is told with !" if found.left else ""))


def _summary(changes: Sequence[Change], created: str, changed: str) -> str:
    new = sum(change.is_new for change in changes)
    return f"{new} {created}, {len(changes) - new} {changed}"


def _told(change: Change, each: Difference) -> str:
    type_ = FIELDS[change.kind][each.field]
    old, new = _texts(type_, each.old), _texts(type_, each.new)
    if change.is_new:
        return ", ".join(new) or "(none)"
    if type_ not in SETS:
        return f"{old[0]} -> {new[0]}"
    signed = [f"+ {text}" for text in new if text not in old]
    return ", ".join(signed + [f"- {text}" for text in old if text not in new])


def _texts(type_: Type, value: Value) -> list[str]:
    """One of each that a value holds."""
    if not isinstance(value, tuple):
        return [str(value).lower() if type_ is Type.FLAG else str(value) or "(none)"]
    if type_ is Type.SCOPES:
        return [f"{name} ({text})" if text else name for name, text in value]
    return [permission_name(each) if type_ is Type.PERMISSIONS else each for each in value]


# --- what is done ---


class _Execution:
    """Takes the steps of a plan, one after the other."""

    def __init__(self, session: Session, found: Plan, secrets_dir: Path | None) -> None:
        from authsvc_client.v1.auth_pb2_grpc import AuthServiceStub
        from authsvc_client.v1.clients_pb2_grpc import ClientServiceStub
        from authsvc_client.v1.resources_pb2_grpc import ResourceServiceStub
        from authsvc_client.v1.roles_pb2_grpc import RoleServiceStub

        self._session = session
        self._auth = AuthServiceStub(session.channel)
        self._clients = ClientServiceStub(session.channel)
        self._resources = ResourceServiceStub(session.channel)
        self._roles = RoleServiceStub(session.channel)
        self._steps = found.steps
        self._secrets_dir = secrets_dir
        self._ids = dict(found.client_ids)
        self._etags: dict[tuple[Kind, Any], str] = {}
        self._let_in: set[ClientKey] = set()
        """New clients whom the server's policy let in at once."""

    def run(self) -> None:
        """Raises Failure that tells how far it came."""
        with self._session.out.progress("applying", len(self._steps)) as advance:
            for done, step in enumerate(self._steps):
                try:
                    self._take(step)
                except Exception as error:
                    raise _stopped(step, error, f"{done} of {len(self._steps)}") from error
                advance(done + 1, step.name)

    def _take(self, step: Step) -> None:
        from authsvc_client.v1 import resources_pb2, roles_pb2

        match step.kind, step.verb:
            case Kind.RESOURCE, _:
                self._write(step, "Resource", self._resources, resources_pb2)
            case Kind.ROLE, _:
                self._write(step, "Role", self._roles, roles_pb2)
            case Kind.PERMISSION, _:
                self._create_permission(step)
            case Kind.ASSIGNMENT, _:
                self._assign(step)
            case Kind.CLIENT, Verb.CREATE:
                self._register(step)
            case Kind.CLIENT, Verb.UPDATE:
                self._update(step)
            case Kind.CLIENT, Verb.RENEW_SECRET:
                self._renew_secret(step)
            case Kind.CLIENT, Verb.APPROVE:
                self._approve(step)

    def _write(self, step: Step, name: str, stub: Any, messages: Any) -> None:
        """Creates or updates an object whose request, response and field have its name."""
        field, verb = name.lower(), step.verb.name.capitalize()
        known = {f"{field}_id": step.key, "etag": self._etag(step)}
        fields = self._json(step)
        request = _message(messages, f"{verb}{name}Request", {field: known | fields})
        if step.verb is Verb.UPDATE:
            request.update_mask.paths.extend(fields)
        answer = self._session.call(getattr(stub, f"{verb}{name}"), request)
        self._etags[step.kind, step.key] = getattr(answer, field).etag

    def _create_permission(self, step: Step) -> None:
        from authsvc_client.v1 import roles_pb2

        resource_id, name = step.key
        ref = {"resource_id": resource_id, "name": name}
        permission = {"ref": ref, **self._json(step)}
        request = _message(roles_pb2, "CreatePermissionRequest", {"permission": permission})
        self._session.call(self._roles.CreatePermission, request)

    def _assign(self, step: Step) -> None:
        from authsvc_client.v1 import roles_pb2

        role_id, client, user_id, resource_id = step.key
        assignment = roles_pb2.RoleAssignment(role_id=role_id, resource_id=resource_id)
        if client is not None:
            assignment.client_id = self._ids[client]
        else:
            assignment.user_id = user_id
        request = roles_pb2.AssignRoleRequest(role_assignment=assignment)
        self._session.call(self._roles.AssignRole, request)

    def _register(self, step: Step) -> None:
        from authsvc_client.v1 import auth_pb2, clients_pb2

        request = _message(auth_pb2, "RegisterClientRequest", {"metadata": self._json(step)})
        answer = self._session.call(self._auth.RegisterClient, request)
        self._ids[step.key] = answer.client.client_id
        # The secret last: where it is missing, the next run makes another.
        self._keep(step, "token", answer.registration_access_token)
        self._keep(step, "secret", answer.client_secret)
        self._etags[step.kind, step.key] = answer.client.etag
        if answer.client.state == clients_pb2.CLIENT_STATE_APPROVED:
            self._let_in.add(step.key)

    def _renew_secret(self, step: Step) -> None:
        """Of a client that waits, unless the run that registered it wrote its secret."""
        from authsvc_client.v1 import clients_pb2

        if self._file(step, "secret").exists():
            return
        client_id = self._ids[step.key]
        get = clients_pb2.GetClientRequest(client_id=client_id)
        before = self._session.call(self._clients.GetClient, get).client
        stale = Failure("the etag is not the current one", code="ABORTED", reason="ETAG_MISMATCH")
        if before.etag != self._etag(step):
            raise stale
        rotate = clients_pb2.RotateClientSecretRequest(client_id=client_id)
        answer = self._session.call(self._clients.RotateClientSecret, rotate)
        self._keep(step, "secret", answer.client_secret)
        after = self._session.call(self._clients.GetClient, get).client
        if before.metadata != after.metadata:
            raise stale
        self._etags[step.kind, step.key] = after.etag

    def _update(self, step: Step) -> None:
        from authsvc_client.v1 import clients_pb2

        fields = self._json(step)
        paths = [name if name == ENDS else f"metadata.{name}" for name in fields]
        ends = {ENDS: fields.pop(ENDS)} if ENDS in fields else {}
        # A name is required in the message; it counts where the mask has it.
        metadata = {"client_name": "-", **fields}
        known = {"client_id": self._ids[step.key], "etag": self._etag(step), "metadata": metadata}
        request = _message(clients_pb2, "UpdateClientRequest", {"client": known | ends})
        request.update_mask.paths.extend(paths)
        answer = self._session.call(self._clients.UpdateClient, request)
        self._etags[step.kind, step.key] = answer.client.etag

    def _approve(self, step: Step) -> None:
        from authsvc_client.v1 import clients_pb2

        if step.key not in self._let_in:
            known = {"client_id": self._ids[step.key], "etag": self._etag(step)}
            fields = known | {"comment": COMMENT} | self._json(step)
            request = _message(clients_pb2, "ApproveClientRequest", fields)
            self._session.call(self._clients.ApproveClient, request)
        elif step.fields:
            self._update(step)

    def _etag(self, step: Step) -> str:
        return self._etags.get((step.kind, step.key), step.etag)

    def _json(self, step: Step) -> dict[str, Any]:
        """Its fields as the contract has them in JSON."""
        found: dict[str, Any] = {}
        for name, value in step.fields.items():
            type_ = FIELDS[step.kind][name]
            if isinstance(value, ClientKey):
                told: Any = self._ids[value]
            elif type_ in ENUMS:
                names = value if isinstance(value, tuple) else (value,)
                told = [f"{enum_of(type_)[1]}{each}".upper() for each in names]
                told = told if type_ in SETS else told[0]
            elif value == "":
                told = None
            else:
                told = written(type_, value)
            found[WIRE_NAMES.get(name, name)] = told
        return found

    # --- secrets: files that nobody else reads ---

    def _file(self, step: Step, suffix: str) -> Path:
        assert self._secrets_dir is not None
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", str(step.fields["client_name"])).strip("-.")
        return self._secrets_dir / f"{slug[:64] or 'client'}-{self._ids[step.key]}.{suffix}"

    def _keep(self, step: Step, suffix: str, text: str) -> None:
        if self._secrets_dir is None or not text:
            return
        descriptor, fresh = tempfile.mkstemp(dir=self._secrets_dir, prefix=".")  # with 0600
        with os.fdopen(descriptor, "w") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        Path(fresh).rename(self._file(step, suffix))  # whole, or not there


def _message(module: Any, name: str, fields: dict[str, Any]) -> Any:
    from google.protobuf.json_format import ParseDict

    return ParseDict(fields, getattr(module, name)())


def _stopped(step: Step, error: Exception, done: str) -> Failure:
    """What failed, after how much."""
    failure = explained(error)
    stopped = copy(failure)
    stopped.message = f"{step.kind} {step.name}: {failure.message}; {done} steps were done"
    stopped.hint = f"{failure.hint}; then run again to finish".removeprefix("; then ")
    if failure.reason in _MEANWHILE or failure.reason.endswith("_NOT_FOUND"):
        stopped.hint = "somebody changed it meanwhile: run again, and look at what is different now"
    return stopped
