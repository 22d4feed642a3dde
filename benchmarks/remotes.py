"""How long a registry on S3 takes, beside the same in a folder: a large expert sent and fetched, many versions listed.

    python benchmarks/remotes.py -o benchmarks/results/remotes.md

The S3 server is moto's, on this machine, one request at a time: what is measured is xpert, s3fs and that server, not a
network. Wall seconds; requests as the server saw them.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from xpert.registry.card import BaseModel, ExpertCard
from xpert.registry.documents import document_bytes
from xpert.registry.opening import open_registry
from xpert.registry.store import Registry
from xpert.registry.versions import Record, StoredFile, Version, content_digest

SERVER = Path(__file__).parents[1] / "tests" / "registry" / "places" / "s3_server.py"


def expert(folder: Path, seed: int, mebibytes: int) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    tensors = {f"layer.{n}.lora_A.weight": rng.normal(size=(256, 1024)).astype(np.float32) for n in range(mebibytes)}
    (folder / "adapter_model.safetensors").write_bytes(save(tensors))
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    ExpertCard(base=BaseModel("base", "b" * 64), adapter={"r": 8}, skills=("sums",)).write(folder)
    return folder


class Place:
    """A registry's location, machines that see it with caches of their own, and the requests that the server saw."""

    def __init__(self, location: str, folder: Path, log: Path) -> None:
        self.location, self.folder, self.log, self.machines = location, folder, log, 0

    def machine(self) -> Registry:
        self.machines += 1
        os.environ["XPERT_CACHE"] = str(self.folder / f"cache{self.machines}")
        return open_registry(self.location)

    def requests(self) -> int:
        return self.log.read_text().count(" HTTP/1.1") if "://" in self.location else 0


def measure(place: Place, rows: list[tuple[str, str, float, int]], what: str, act: Callable[[], object]) -> None:
    before, start = place.requests(), time.perf_counter()
    act()
    spent = time.perf_counter() - start
    rows.append(("S3" if "://" in place.location else "folder", what, spent, place.requests() - before))
    print(f"{rows[-1][0]:7}{what:48}{spent:8.2f} s {rows[-1][3]:6} requests", flush=True)


def fill(registry: Registry, count: int) -> None:
    """`count` records of made-up experts, written straight to the place."""
    for number in range(count):
        files = (StoredFile("expert.json", 100, f"{number:064x}"),)
        version = Version(
            f"owner{number % 20}/e{number}", 1, "expert", content_digest(files), "2026-01-01T00:00:00Z", 100
        )
        record = Record(version, files)
        if hasattr(registry, "remote"):
            registry.remote.write(str(record.document), document_bytes(record.to_dict()), mark=None)
        else:
            registry.records.add(record)


def run(place: Place, mebibytes: int, versions: int, rows: list[tuple[str, str, float, int]]) -> None:
    first = expert(place.folder / "one", 1, mebibytes)
    second = expert(place.folder / "two", 2, 1)
    a, b = place.machine(), place.machine()
    measure(place, rows, f"publish {mebibytes} MiB in {mebibytes} tensors", lambda: a.publish(first, "acme/large"))
    a.publish(second, "acme/small")
    os.environ["XPERT_CACHE"] = str(place.folder / "cache2")
    measure(place, rows, "pull it on another machine", lambda: b.pull("acme/large", place.folder / "out"))
    fill(a, versions - 2)
    c = place.machine()
    measure(place, rows, f"list {versions:,} versions for the first time", lambda: list(c.list()))
    time.sleep(3)
    measure(place, rows, "list them again", lambda: list(c.list()))
    a.tag("acme/small@1", "stable")
    time.sleep(3)
    measure(place, rows, "list them after one tag was moved elsewhere", lambda: list(c.list()))


@contextmanager
def s3(folder: Path) -> Iterator[tuple[str, Path]]:
    import s3fs

    log = folder / "log"
    with log.open("w") as stream:
        server = subprocess.Popen([sys.executable, SERVER], stdout=subprocess.PIPE, stderr=stream, text=True)
        try:
            assert server.stdout is not None
            os.environ |= {
                "AWS_ENDPOINT_URL": server.stdout.readline().strip(),
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_ACCESS_KEY_ID": "key",
                "AWS_SECRET_ACCESS_KEY": "secret",
            }
            s3fs.S3FileSystem().mkdir("bench")
            yield "s3://bench/registry", log
        finally:
            server.kill()
            server.wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--mebibytes", type=int, default=50)
    parser.add_argument("--versions", type=int, default=1_000)
    given = parser.parse_args()
    rows: list[tuple[str, str, float, int]] = []
    with tempfile.TemporaryDirectory() as folder, s3(Path(folder)) as (location, log):
        for name, where in (("s3", location), ("folder", str(Path(folder) / "registry"))):
            (Path(folder) / name).mkdir()
            run(Place(where, Path(folder) / name, log), given.mebibytes, given.versions, rows)
    lines = [
        "# A registry on S3, beside a folder",
        "",
        f"`python benchmarks/remotes.py --mebibytes {given.mebibytes} --versions {given.versions}`, "
        f"{os.cpu_count()} cores ({platform.machine()}, load average {os.getloadavg()[0]:.1f} at the end), Python "
        f"{platform.python_version()}; moto's S3 server on the same machine.",
        "",
        "| place | what | seconds | requests |",
        "|---|---|---|---|",
        *(f"| {place} | {what} | {spent:.2f} | {count or '–'} |" for place, what, spent, count in rows),
    ]
    if given.out:
        given.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
