"""The Hub through `huggingface_hub`: its errors in our words, what passes tried again, and files read by stretches.

Tokens are the client's own business (HF_TOKEN, `hf auth login`); none is read or shown here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any, TypeVar
from urllib.parse import urlsplit

from xpert.errors import BadInput, NotFound, Unavailable, XpertError
from xpert.registry.remotes._hub_errors import passing, status_of, translated
from xpert.registry.remotes._hub_layout import Entry, Head
from xpert.registry.remotes._transfer import Told, in_parallel

__all__ = ["LARGE", "WAITS", "HubClient", "Moved", "Stretch", "endpoint_shown"]

T = TypeVar("T")
WAITS = (0.5, 1.0, 2.0, 4.0)
"""Seconds before what failed in passing is tried again."""
LARGE = 1 << 20
"""Bytes from which a file travels ahead of its commit, on a thread of its own."""
TIMEOUT = 60.0


class Moved(Exception):
    """A commit was refused, since somebody else made one before it."""


def endpoint_shown() -> str:
    """The address that HF_ENDPOINT asks for, without credentials; "" for the Hub itself."""
    address = os.environ.get("HF_ENDPOINT", "").strip().rstrip("/")
    parts = urlsplit(address)
    return (
        "" if not address or parts.hostname == "huggingface.co" else f"{parts.scheme}://{parts.netloc.split('@')[-1]}"
    )


class HubClient:
    """The calls that a registry needs. `where` is what errors name."""

    def __init__(self, where: str) -> None:
        self.where = where

    @cached_property
    def api(self) -> Any:
        try:
            from huggingface_hub import HfApi
        except ImportError:
            raise Unavailable(
                "huggingface_hub is not installed", where=self.where, hint="pip install huggingface_hub"
            ) from None
        return HfApi(endpoint=os.environ.get("HF_ENDPOINT", "").strip().rstrip("/") or None, library_name="xpert")

    # ── errors ───────────────────────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def errors(self, where: str | None = None) -> Iterator[None]:
        """Turns the client's errors into ours."""
        try:
            yield
        except (XpertError, FileExistsError, Moved):
            raise
        except Exception as error:  # the client's, httpx's and sockets' have no common base; others are raised again
            ours = translated(error, where or self.where)
            if ours is None:
                raise
            raise ours from None

    def ask(self, call: Callable[..., T], *arguments: Any, **settings: Any) -> T:
        """`call` with what passes tried again; for calls that may be made twice."""
        for wait in WAITS:
            try:
                return call(*arguments, **settings)
            except Exception as error:  # as in `errors`: what does not pass is raised again
                if not passing(error):
                    raise
                time.sleep(wait)
        return call(*arguments, **settings)

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────

    def head(self, repository: str, revision: str | None = None) -> Head:
        """The newest commit of `main`, or the one that a revision means, with its files. Two requests."""
        with self.errors(repository):
            commit = str(self.ask(self.api.model_info, repository, revision=revision, timeout=TIMEOUT).sha)
            return self.tree(repository, commit)

    def tree(self, repository: str, commit: str, folder: str | None = None) -> Head:
        """A commit's files, or those under a folder. A request per 1,000."""
        files = {}
        with self.errors(repository):
            listing = self.api.list_repo_tree(repository, folder, recursive=True, revision=commit)
            for entry in listing:
                if hasattr(entry, "blob_id"):  # a file; folders have a tree_id
                    sha256 = None if entry.lfs is None else entry.lfs.sha256
                    files[entry.path] = Entry(int(entry.size), str(entry.blob_id), sha256)
        return Head(repository, commit, files)

    def tags(self, repository: str) -> dict[str, str]:
        """Git tag -> the commit it points to."""
        with self.errors(repository):
            refs = self.ask(self.api.list_repo_refs, repository)
        return {str(ref.name): str(ref.target_commit) for ref in refs.tags}

    def titled(self, repository: str, title: str) -> str | None:
        """The newest commit with that first line. A request per some 50 commits."""
        with self.errors(repository):
            commits = self.api.list_repo_commits(repository)
        return next((str(commit.commit_id) for commit in commits if commit.title == title), None)

    @cached_property
    def namespaces(self) -> list[str]:
        """The user's own name and those of their organizations; none where nobody is logged in."""
        from huggingface_hub import get_token

        with self.errors():
            if get_token() is None:
                return []
            who = self.ask(self.api.whoami)
        return [str(who["name"]), *(str(organization["name"]) for organization in who.get("orgs") or ())]

    def small(self, repository: str, revision: str, path: str, most: int) -> bytes:
        """A small file, its size bounded while it is read; raises NotFound where there is none."""
        with self.errors(f"{repository}/{path}"):
            stretch = Stretch(self, repository, revision, path)
            try:
                data = stretch.read(0, most + 1)
            finally:
                stretch.close()
        if len(data) > most:
            raise BadInput(f"more than the {most:,} bytes that are allowed", where=f"{repository}/{path}")
        return data

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────

    def create(self, repository: str, *, private: bool | None) -> None:
        """Makes a repository, unless it is there already."""
        with self.errors(repository):
            self.ask(self.api.create_repo, repository, private=private, exist_ok=True)

    def upload(self, repository: str, additions: Sequence[Any], told: Told, workers: int) -> None:
        """Sends the large contents of a commit ahead, in parallel; what the Hub has already does not travel."""

        def send(addition: Any) -> None:
            self.api.preupload_lfs_files(repository, [addition], free_memory=False)
            told(addition.upload_info.size)

        large = [addition for addition in additions if addition.upload_info.size >= LARGE]
        with self.errors(repository), _quiet():
            in_parallel(send, large, workers)
        told(sum(addition.upload_info.size for addition in additions if addition.upload_info.size < LARGE))

    def commit(self, repository: str, operations: Iterable[Any], title: str, parent: str) -> str:
        """All operations in one commit upon `parent`, and its hash; raises Moved where `main` is not there any more."""
        with self.errors(repository), _quiet():
            try:
                made = self.api.create_commit(
                    repository, list(operations), commit_message=title, parent_commit=parent, num_threads=8
                )
            except Exception as error:  # as in `errors`: what has another status, or none, is raised again
                if status_of(error) in (409, 412):
                    raise Moved from None
                raise
        return str(made.oid)

    def tag(self, repository: str, tag: str, commit: str) -> None:
        with self.errors(repository):
            self.ask(self.api.create_tag, repository, tag=tag, revision=commit, exist_ok=True)

    def untag(self, repository: str, tag: str) -> None:
        """Deletes a git tag; that it is gone already is no fault."""
        with suppress(NotFound), self.errors(repository):
            self.ask(self.api.delete_tag, repository, tag=tag)


class Stretch:
    """Bytes of a file at a commit, read onward over one connection, which is made anew where it breaks or one jumps."""

    def __init__(self, client: HubClient, repository: str, revision: str, path: str) -> None:
        from huggingface_hub import hf_hub_url

        self._client = client
        self._url = hf_hub_url(repository, path, revision=revision, endpoint=client.api.endpoint)
        self._response: Any = None
        self._chunks: Iterator[bytes] = iter(())
        self._at, self._held = 0, b""

    def read(self, start: int, end: int) -> bytes:
        """Bytes [start, end), fewer where the file ends before."""
        found = bytearray()
        for wait in (*WAITS, None):
            try:
                if self._response is None or self._at != start + len(found):
                    self._open(start + len(found))
                while len(found) < end - start and (data := self._some(end - start - len(found))):
                    found += data
                return bytes(found)
            except Exception as error:  # as in `errors`: what does not pass is raised again
                self.close()
                if wait is None or not passing(error):
                    raise
                time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def close(self) -> None:
        if self._response is not None:
            self._response.close()
        self._response, self._held = None, b""

    def _open(self, start: int) -> None:
        from huggingface_hub import get_session

        utils = _utils()
        self.close()
        headers = {**utils.build_hf_headers(library_name="xpert"), "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        session = get_session()
        request = session.build_request("GET", self._url, headers=headers, timeout=TIMEOUT)
        # The client takes the token off where storage at another host is pointed to.
        response = session.send(request, stream=True, follow_redirects=True)
        self._response, self._at = response, start
        if response.status_code == 416:  # the file ends before
            self._chunks = iter(())
            return
        utils.hf_raise_for_status(response)
        self._chunks = response.iter_bytes()
        if start and response.status_code != 206:  # told from the beginning all the same
            self._at = 0
            while self._at < start and self._some(start - self._at):
                pass

    def _some(self, most: int) -> bytes:
        """The next bytes, at most so many; none at the end."""
        while not self._held:
            chunk = next(self._chunks, None)
            if chunk is None:
                return b""
            self._held = chunk
        data, self._held = self._held[:most], self._held[most:]
        self._at += len(data)
        return data


@contextmanager
def _quiet() -> Iterator[None]:
    """The client's own bars and its warnings, which show addresses that storage was opened with, are kept back."""
    from huggingface_hub import constants

    utils = _utils()
    bars = constants.HF_HUB_DISABLE_PROGRESS_BARS is None and not utils.are_progress_bars_disabled()
    level = utils.logging.get_verbosity()
    if bars:
        utils.disable_progress_bars()
    utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        utils.logging.set_verbosity(level)
        if bars:
            utils.enable_progress_bars()


def _utils() -> Any:
    """The client's documented tools, which its types do not list as exported."""
    from huggingface_hub import utils

    return utils
