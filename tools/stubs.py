"""Regenerates the committed Python stubs; with --check only compares and names what differs."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
CLIENT = PurePosixPath("clients/python/src")
STUBS = CLIENT / "authsvc_client/v1"
OPTION = CLIENT / "authsvc/v1"  # what users' generated code imports
SHIPPED = CLIENT / "authsvc_client/protos"  # what users give to protoc -I
EXAMPLES = PurePosixPath("examples/services/v1")

# Newer grpcio-tools emit code that refuses the oldest protobuf the client supports.
TOOLS = ("grpcio-tools==1.76.0", "mypy-protobuf==5.1.0", "protobuf==6.33.6")

OUR_IMPORTS = re.compile(
    r"^(from )authsvc\.v1(?= import )|\b()authsvc\.v1(?=\.\w+_pb2(?:_grpc)?\b)", re.MULTILINE
)
REEXPORT = '"""The option (authsvc.v1.require), where generated code looks for it."""\n\n'
STAR = "from authsvc_client.v1.annotations_pb2 import *  # noqa: F403\n"

Files = dict[PurePosixPath, str]


def protoc(includes: Sequence[Path], protos: Iterable[Path]) -> Files:
    """The files that protoc makes of `protos`, by their path below the output folder."""
    uv = [os.environ.get("UV", "uv"), "run", "--quiet", "--isolated", "--no-project"]
    uv += ["--python", sys.executable, *(f"--with={tool}" for tool in TOOLS)]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [f"--{plugin}_out={folder}" for plugin in ("python", "grpc_python")]
        outputs += [f"--{plugin}_out=quiet:{folder}" for plugin in ("mypy", "mypy_grpc")]
        command = [*uv, "python", "-m", "grpc_tools.protoc", *(f"-I{path}" for path in includes)]
        names = sorted(str(path) for path in protos)
        done = subprocess.run([*command, *outputs, *names], cwd=ROOT, check=False)  # noqa: S603
        if done.returncode:
            sys.exit("protoc failed: what it printed above says where")
        made = {path: path.read_text() for path in Path(folder).rglob("*.py*")}
        without_service = {path.stem for path, text in made.items() if _empty_grpc(path, text)}
        return {
            PurePosixPath(path.relative_to(folder).as_posix()): text
            for path, text in made.items()
            if path.stem not in without_service
        }


def _empty_grpc(path: Path, text: str) -> bool:
    return path.name.endswith("_pb2_grpc.py") and "Servicer" not in text


def client_files(protos: Path) -> Files:
    files: Files = {
        STUBS / "__init__.py": '"""Generated from protos/authsvc/v1 by `make stubs`."""\n',
        SHIPPED / "authsvc/v1/annotations.proto": (
            protos / "authsvc/v1/annotations.proto"
        ).read_text(),
        OPTION / "annotations_pb2.py": REEXPORT + STAR,
        OPTION / "annotations_pb2.pyi": STAR,
        OPTION / "py.typed": "",
    }
    for path, text in protoc([protos], (protos / "authsvc/v1").glob("*.proto")).items():
        files[STUBS / path.name] = OUR_IMPORTS.sub(r"\1\2authsvc_client.v1", text)
    return files


def example_files(examples: Path, shipped: Path) -> Files:
    protos = sorted((examples / "services/v1").glob("*.proto"))
    if not protos:
        return {}
    made = protoc([examples, shipped], protos)
    return {EXAMPLES / path.name: text for path, text in made.items()}


def wanted(root: Path) -> Files:
    files = client_files(root / "protos")
    with tempfile.TemporaryDirectory() as folder:  # what is about to be shipped, not what was
        shipped = Path(folder)
        option = shipped / "authsvc/v1/annotations.proto"
        option.parent.mkdir(parents=True)
        option.write_text(files[SHIPPED / "authsvc/v1/annotations.proto"])
        return files | example_files(root / "examples", shipped)


def differing(root: Path, files: Files) -> list[PurePosixPath]:
    present = {
        PurePosixPath(path.relative_to(root).as_posix())
        for folder in (STUBS, EXAMPLES)
        for path in (root / folder).glob("*_pb2*.py*")
    }
    stale = present - files.keys()
    changed = {path for path, text in files.items() if _read(root / path) != text}
    return sorted(stale | changed)


def _read(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None


def write(root: Path, path: PurePosixPath, text: str | None) -> None:
    target = root / path
    if text is None:
        target.unlink()
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout (default: this one)")
    arguments = parser.parse_args()
    root: Path = arguments.root.resolve()
    files = wanted(root)
    paths = differing(root, files)
    if arguments.check and paths:
        listed = "\n  ".join(map(str, paths))
        sys.exit(f"These stubs differ from their protos, run `make stubs`:\n  {listed}")
    for path in paths:
        write(root, path, files.get(path))
        sys.stdout.write(f"{'wrote' if path in files else 'removed'} {path}\n")


if __name__ == "__main__":
    main()
