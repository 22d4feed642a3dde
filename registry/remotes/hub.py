"""The Hugging Face Hub: a model repository per expert, a commit and a git tag per version, the documents beside."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qsl, urlsplit

from xpert.errors import BadInput, Corrupt, NotFound, XpertError
from xpert.progress import SILENT, Progress
from xpert.registry.blobs import BlobStore
from xpert.registry.documents import MOST_BYTES, parse_document
from xpert.registry.names import NAME_PATTERN
from xpert.registry.remotes._hub_client import HubClient, Stretch, endpoint_shown
from xpert.registry.remotes._hub_layout import FOLDER, document_path, documents_in
from xpert.registry.remotes._hub_repository import WORKERS, HubRepository
from xpert.registry.remotes._transfer import fetch_blob, in_parallel, telling
from xpert.registry.soundness import Problem
from xpert.registry.versions import Part, Record, StoredFile
from xpert.storage import cache_folder, hash_file, read_json, write_json

__all__ = ["Hub"]

TAG = "xpert"
PIECE = 1 << 20
STRETCH = 32 << 20
"""Bytes that travel over one connection: a larger file takes several at once."""
_REMEDY = "publish the expert again from its folder, which puts the file right"


@dataclass(frozen=True)
class _Stretch:
    """Neighbouring parts of a file that are wanted, and where the first of them begins."""

    path: str
    start: int
    parts: tuple[Part, ...]


class Hub:
    """The versions of one namespace, `hf://NAMESPACE`, or of the whole Hub, `hf://`.

    With a namespace, the versions of OWNER/NAME lie in the repository NAMESPACE/NAME, whoever OWNER is; without one, in
    OWNER/NAME. `?private=1` makes the repositories that publishing creates private. The Hub is that of HF_ENDPOINT, the
    token the client's own: HF_TOKEN, or what `hf auth login` kept.
    """

    schemes: ClassVar[tuple[str, ...]] = ("hf",)
    cost = "sync: 1 request per 1,000 repositories, 1 per repository that changed, 1 per new document; publish: some 20"
    source = "huggingface_hub, https://huggingface.co/docs/huggingface_hub"

    def __init__(self, url: str) -> None:
        self.namespace, self.private = _parse(url)
        endpoint = endpoint_shown()
        self.location = f"hf://{self.namespace}{f'?endpoint={endpoint}' if endpoint else ''}"
        self.client = HubClient(self.location)
        self._changed: set[str] = set()  # repositories changed from here, which the Hub's listing may not tell yet

    # ── documents ────────────────────────────────────────────────────────────────────────────────────────────────

    def listing(self) -> Mapping[str, str]:
        """See `Remote`. A mark is git's name of the content. What a commit holds is remembered in the user's cache."""
        heads = self._repositories()
        memory = cache_folder() / "hub" / f"{hashlib.sha256(self.location.encode()).hexdigest()[:32]}.json"
        known = _remembered(memory)
        found: dict[str, dict[str, Any]] = {}

        def look(repository: str) -> None:
            commit = heads[repository]
            if known.get(repository, {}).get("commit") == commit:
                found[repository] = known[repository]
                return
            try:
                files = self.client.tree(repository, commit, FOLDER).files
            except NotFound:
                return  # deleted since it was listed, or none of ours after all
            marks = documents_in((path, entry.oid) for path, entry in files.items())
            found[repository] = {"commit": commit, "documents": marks}

        in_parallel(look, heads, WORKERS)
        if found != known:
            write_json(memory, found)
        return {
            document: mark
            for repository, entry in found.items()
            for document, mark in entry["documents"].items()
            if self._repository(parse_document(document).name) == repository
        }

    def read(self, document: str) -> bytes:
        repository = self._repository(parse_document(document).name)
        try:
            return self.client.small(repository, "main", document_path(document), MOST_BYTES)
        except NotFound:
            raise NotFound(f"there is no {document}", where=self.location) from None

    def write(self, document: str, data: bytes, *, mark: str | None) -> None:
        name = parse_document(document)
        repository = self._repository(name.name)
        try:
            HubRepository(self.client, repository).put(name, data, mark, private=self.private)
        finally:
            self._changed.add(repository)

    def _repositories(self) -> dict[str, str]:
        """Repository -> its newest commit, for those that may hold documents."""
        heads = {}
        with self.client.errors():
            for model in self._models():
                siblings = model.siblings
                ours = siblings is None or any(file.rfilename.startswith(f"{FOLDER}/") for file in siblings)
                if model.sha and ours and NAME_PATTERN.fullmatch(model.id):
                    heads[str(model.id)] = str(model.sha)
        for repository in sorted(self._changed):
            try:
                heads[repository] = self.client.head(repository).commit
            except NotFound:
                heads.pop(repository, None)
        return heads

    def _models(self) -> Iterator[Any]:
        """The models of the namespace; without one, all with the tag `xpert` and all of the user's namespaces."""
        expand = ["sha", "siblings", "gated"]
        if self.namespace:
            yield from self.client.api.list_models(author=self.namespace, expand=expand)
            return
        # A stranger's repository that asks for consent would stop everybody who has not given it.
        yield from (model for model in self.client.api.list_models(filter=TAG, expand=expand) if not model.gated)
        for namespace in self.client.namespaces:
            yield from self.client.api.list_models(author=namespace, expand=expand)

    def _repository(self, name: str) -> str:
        return f"{self.namespace}/{name.partition('/')[2]}" if self.namespace else name

    # ── versions ─────────────────────────────────────────────────────────────────────────────────────────────────

    def push(self, record: Record, data: bytes, blobs: BlobStore, progress: Progress = SILENT) -> None:
        repository = self._repository(record.version.name)
        total = sum(file.size for file in record.files)
        with ExitStack() as drafts, telling(progress, f"sending {record.version.ref}", total) as told:
            files = {file.path: _whole(file, blobs, drafts, record.version.ref) for file in record.files}
            try:
                HubRepository(self.client, repository).publish(record, data, files, told, private=self.private)
            finally:
                self._changed.add(repository)

    def fetch(self, record: Record, files: Sequence[StoredFile], blobs: BlobStore, progress: Progress = SILENT) -> None:
        """See `Remote`. Of a file that is partly here, the parts that are missing travel."""
        stretches = list(_stretches(files, blobs))
        if not stretches:
            return
        ref = record.version.ref
        repository = self._repository(record.version.name)
        found = HubRepository(self.client, repository).find(record)
        for stretch in stretches:
            if stretch.path in found.wrong:
                raise Corrupt(
                    f"{found.wrong[stretch.path]} in {repository}", where=f"{ref}: {stretch.path}", hint=_REMEDY
                )
        total = sum(part.size for stretch in stretches for part in stretch.parts)
        with telling(progress, f"fetching {ref}", total) as told:

            def bring(stretch: _Stretch) -> None:
                stream = Stretch(self.client, repository, found.head.commit, stretch.path)
                start = stretch.start
                what = f"{ref}: {stretch.path}"
                try:
                    for part in stretch.parts:

                        def read(first: int, end: int, start: int = start) -> bytes:
                            return stream.read(start + first, start + end)

                        fetch_blob(blobs, part.sha256, part.size, read, piece=PIECE, what=what, told=told)
                        start += part.size
                finally:
                    stream.close()

            with self.client.errors(repository):
                in_parallel(bring, stretches, WORKERS)

    # ── keeping house ────────────────────────────────────────────────────────────────────────────────────────────

    def sweep(self, needed: Collection[str], *, dry_run: bool = False) -> tuple[int, int]:
        """Nothing: the Hub keeps all commits, and with them the files of removed versions."""
        return 0, 0

    def problems(self, records: Iterable[Record], progress: Progress = SILENT) -> Iterator[Problem]:
        """See `Remote`. Large files are checked by the sha256 that the Hub keeps, small ones by their content."""
        every = list(records)
        documents = self.listing()
        found: dict[str, list[Problem]] = {}

        def check(record: Record) -> None:
            found[record.version.ref] = list(self._problems(record, documents))
            task.advance()

        with progress.task("verifying", len(every)) as task:
            in_parallel(check, every, WORKERS)
        for record in every:
            yield from found[record.version.ref]

    def _problems(self, record: Record, documents: Mapping[str, str]) -> Iterator[Problem]:
        ref, document = record.version.ref, record.document
        repository = self._repository(record.version.name)
        if str(document) not in documents:
            if f"{ref}.removed.json" not in documents:
                yield Problem(ref, f"its record is missing in {repository}")
            return
        try:
            if Record.from_bytes(self.read(str(document)), where=repository) != record:
                yield Problem(ref, f"{repository} has another record of it")
            found = HubRepository(self.client, repository).find(record)
        except XpertError as error:
            yield Problem(ref, error.what)
            return
        for path, what in sorted(found.wrong.items()):
            yield Problem(f"{ref}: {path}", f"{what} in {repository}")
        if found.tagged != found.head.commit:
            what = "missing" if found.tagged is None else "at another commit"
            yield Problem(ref, f"the git tag v{record.version.version} of {repository} is {what}")
        for file in record.files:
            if file.path not in found.wrong and found.head.files[file.path].sha256 is None:
                data = self.client.small(repository, found.head.commit, file.path, file.size)
                if hashlib.sha256(data).hexdigest() != file.sha256:
                    yield Problem(f"{ref}: {file.path}", f"damaged: not what was published, in {repository}")


def _whole(file: StoredFile, blobs: BlobStore, drafts: ExitStack, ref: str) -> Path:
    """A file in one piece: its blob, or a draft made of its parts. Raises Corrupt where it is damaged here."""
    what = f"{ref}: {file.path}"
    if not file.parts:
        path = blobs.path(file.sha256)
        if not path.is_file() or hash_file(path) != file.sha256:
            raise Corrupt("damaged or missing here", where=what, hint=_REMEDY)
        return path
    path, _ = drafts.enter_context(blobs.drafts.new())
    path.unlink()
    blobs.copy(file, path, what=what)
    return path


def _stretches(files: Sequence[StoredFile], blobs: BlobStore) -> Iterator[_Stretch]:
    """What is missing here, in stretches of neighbouring parts; a content that is wanted twice comes once."""
    wanted: set[str] = set()
    for file in files:
        start, run, at = 0, list[Part](), 0
        for part in file.blobs:
            path = blobs.path(part.sha256)
            here = part.sha256 in wanted or (path.is_file() and path.stat().st_size == part.size)
            if run and (here or at - start >= STRETCH):
                yield _Stretch(file.path, start, tuple(run))
                run = []
            if not here:
                start = start if run else at
                run.append(part)
                wanted.add(part.sha256)
            at += part.size
        if run:
            yield _Stretch(file.path, start, tuple(run))


def _remembered(path: Path) -> dict[str, dict[str, Any]]:
    """What earlier listings found; nothing where that cannot be read, since it can be asked for again."""
    try:
        value = read_json(path)
        return {
            str(repository): {"commit": str(entry["commit"]), "documents": dict(entry["documents"])}
            for repository, entry in value.items()
        }
    except (XpertError, KeyError, TypeError, ValueError, AttributeError):
        return {}


def _parse(url: str) -> tuple[str, bool | None]:
    """The namespace, and whether new repositories are private (None: as the namespace's own setting says)."""
    parts = urlsplit(url)
    namespace = parts.netloc
    if "@" in namespace or ":" in namespace:
        raise BadInput(
            "an address of the Hub holds no token",
            where="hf://...",
            hint="log in with `hf auth login`, or set HF_TOKEN",
        )
    if parts.path.strip("/"):
        raise BadInput("more than a namespace", where=url, hint=f"write hf://{namespace}, and the name apart from it")
    if namespace and NAME_PATTERN.fullmatch(f"{namespace}/x") is None:
        raise BadInput(f"{namespace!r} is not a namespace", where=url, hint="write hf://NAMESPACE or hf://")
    private = None
    for key, value in parse_qsl(parts.query, keep_blank_values=True):
        if key == "private" and value.lower() in ("1", "true", "yes", "0", "false", "no"):
            private = value.lower() in ("1", "true", "yes")
        elif key != "endpoint" or value != endpoint_shown():
            hint = "set HF_ENDPOINT" if key == "endpoint" else "write ?private=1, or nothing"
            raise BadInput(f"{key}={value} is no option of an address of the Hub", where=f"hf://{namespace}", hint=hint)
    return namespace, private


PLUGIN = Hub
