"""Settings: flag over environment over file over default."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from authsvc.oauth.spiffe import check_trust_domain, parse_workload

_FILE_SUFFIX = "_FILE"
Port = Annotated[int, Field(ge=0, le=65535)]


def default_state_dir() -> Path:
    """Where a server without configuration keeps what it needs."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "authsvc"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class Database(_Section):
    """Where the truth is."""

    url: SecretStr | None = Field(
        None,
        description="SQLAlchemy URL: `postgresql+asyncpg://…` or `sqlite+aiosqlite:///…`;"
        " unset: `authsvc.db` in the state directory",
    )
    synchronous: bool = Field(
        False, description="vouches that a failover of the database loses no commit"
    )


class Tls(_Section):
    """Certificates of the listener; all three or none."""

    certificate: Path | None = Field(
        None, description="PEM chain of the server; unset: made in the state directory"
    )
    key: Path | None = Field(None, description="PEM private key of it")
    client_ca: Path | None = Field(None, description="PEM CAs that client certificates come from")
    reload_s: float = Field(
        5.0, gt=0, description="how often the files are looked at for a change, seconds"
    )

    @model_validator(mode="after")
    def _whole(self) -> "Tls":
        given = [self.certificate, self.key, self.client_ca]
        if any(given) and not all(given):
            raise ValueError("certificate, key and client_ca belong together")
        return self


class Listen(_Section):
    """Addresses; port 0 lets the kernel choose."""

    host: str = Field("127.0.0.1", description="address of the gRPC port")
    port: Port = Field(7443, description="gRPC over mTLS")
    metrics_host: str = Field("127.0.0.1", description="address of the metrics port")
    metrics_port: Port = Field(7490, description="/metrics, /livez and /readyz over HTTP")
    health_host: str = Field("127.0.0.1", description="address of the health port")
    health_port: Port = Field(7491, description="gRPC health without TLS")


class Settings(BaseSettings):
    """All settings of `authsvc serve`."""

    model_config = SettingsConfigDict(
        env_prefix="AUTHSVC_",
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
    )

    state_dir: Path = Field(
        default_factory=default_state_dir, description="directory for what has no setting"
    )
    issuer: str = Field(
        "https://authsvc.local", description="`iss` of all tokens, and authsvc as a resource"
    )
    trust_domain: str = Field("authsvc.local", description="SPIFFE trust domain of the own PKI")
    admins: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="SPIFFE IDs of the first administrators (comma-separated in the environment);"
        " with the own PKI also `spiffe://<trust domain>/admin`",
    )
    admin_ca: str = Field(
        "",
        description="CA that must have issued their certificates (hex SHA-256 of its"
        " SubjectPublicKeyInfo); unset: the listener's only client CA",
    )
    seal_keys: SecretStr | None = Field(
        None,
        description="keys that encrypt at rest, 64 hex digits each, comma-separated, the first"
        " encrypts; unset: made in the state directory",
    )
    staleness_max_s: float = Field(
        120.0, ge=5, le=600, description="longest age of a confirmed state to judge by, seconds"
    )
    drain_s: float = Field(
        10.0, ge=0, description="time that calls under way have to end at SIGTERM, seconds"
    )
    reflection: bool = Field(False, description="answer gRPC server reflection")
    log_level: str = Field(
        "info", pattern="^(debug|info|warning|error)$", description="debug, info, warning or error"
    )
    database: Database = Database()
    tls: Tls = Tls()
    listen: Listen = Listen()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the signature is pydantic's
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        file = os.environ.get(CONFIG_VARIABLE)
        if isinstance(env_settings, EnvSettingsSource):
            env_settings.env_vars = _with_files(env_settings.env_vars)
        toml = (TomlConfigSettingsSource(settings_cls, Path(file)),) if file else ()
        return (init_settings, env_settings, *toml)

    @field_validator("trust_domain")
    @classmethod
    def _trust_domain(cls, value: str) -> str:
        check_trust_domain(value)
        return value

    @field_validator("admins", mode="before")
    @classmethod
    def _comma_separated(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",")] if isinstance(value, str) else value

    @field_validator("admins")
    @classmethod
    def _admins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for spiffe_id in value:
            parse_workload(spiffe_id)
        return value

    @field_validator("issuer")
    @classmethod
    def _issuer(cls, value: str) -> str:
        # RFC 8414 section 2: https, without query and fragment.
        if not value.startswith("https://") or set("?# ") & set(value) or len(value) > 512:
            raise ValueError("is an https URL without query and fragment")
        return value

    @field_validator("seal_keys")
    @classmethod
    def _seal_keys(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            parse_seal_keys(value.get_secret_value())
        return value


def parse_seal_keys(text: str) -> tuple[bytes, ...]:
    """Keys from their setting; ValueError, without their text, where one is malformed."""
    keys = []
    for part in text.strip().split(","):
        try:
            key = bytes.fromhex(part.strip())
        except ValueError:
            key = b""
        if len(key) != 32:
            raise ValueError("each key has 64 hexadecimal digits")
        keys.append(key)
    return tuple(keys)


CONFIG_VARIABLE = "AUTHSVC_CONFIG"
SECRET_VARIABLES = ("AUTHSVC_SEAL_KEYS", "AUTHSVC_DATABASE__URL")


def _with_files(variables: Mapping[str, str | None]) -> Mapping[str, str | None]:
    """The environment, in lower case, with the content of the files that it names."""
    found = dict(variables)
    for variable in map(str.lower, SECRET_VARIABLES):
        file = found.pop(variable + _FILE_SUFFIX.lower(), None)  # pydantic would not know it
        if file and not found.get(variable):
            found[variable] = Path(file).read_text(encoding="utf-8").strip()
    return found


def load(config: Path | None = None, **flags: Any) -> Settings:
    """Settings of this process; `AUTHSVC_…_FILE` names a file that holds a secret.

    `config` goes before `AUTHSVC_CONFIG`. ValueError (pydantic's) where a setting is malformed,
    OSError where a file cannot be read.
    """
    if config is not None:
        os.environ[CONFIG_VARIABLE] = str(config)
    if file := os.environ.get(CONFIG_VARIABLE):
        Path(file).read_bytes()  # pydantic passes over a file that is not there
    return Settings(**{name: value for name, value in flags.items() if value is not None})
