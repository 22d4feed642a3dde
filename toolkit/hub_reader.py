"""Sources read through the `datasets` package: folders it saved, and data sets of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from xpert.errors import BadInput, Corrupt, NotFound, Unavailable
from xpert.source_files import BLOCK_ROWS, Block, no_report
from xpert.storage import hash_file, hash_json
from xpert.table_readers import arrow_block

__all__ = ["DatasetFolder", "HubSource"]


class DatasetFolder:
    """A folder written by `Dataset.save_to_disk`; a row's line is its number, counted from 1."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self.where = str(path)
        self.files = [file for file in sorted(path.rglob("*")) if file.is_file()]
        self.size: int | None = sum(file.stat().st_size for file in self.files)

    def fingerprint(self) -> str:
        return hash_json([[file.relative_to(self.path).as_posix(), hash_file(file)] for file in self.files])

    def blocks(self, moved: Callable[[int], None] = no_report) -> Iterator[Block]:
        dataset = self._load()
        if not len(dataset):
            raise BadInput("the data set is empty", where=self.where, hint="it must hold at least one row")
        line = 1
        for batch in dataset.with_format("arrow").iter(batch_size=BLOCK_ROWS):
            yield arrow_block(batch, line)
            line += batch.num_rows
            moved(round((self.size or 0) * batch.num_rows / len(dataset)))

    def _load(self) -> Any:
        import datasets

        try:
            loaded = datasets.load_from_disk(str(self.path))
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise Corrupt(f"`datasets` cannot load it ({reason})", where=self.where) from None
        if isinstance(loaded, datasets.DatasetDict):
            if len(loaded) != 1:
                splits = ", ".join(loaded)
                raise BadInput(
                    f"it holds several splits: {splits}",
                    where=self.where,
                    hint=f"name one: {self.path / next(iter(loaded))}",
                )
            return next(iter(loaded.values()))
        return loaded


class HubSource:
    """`hf:owner/name[:config][:split]`, streamed; the split is `train` where none is named."""

    def __init__(self, spec: str) -> None:
        repository, *rest = spec.removeprefix("hf:").split(":")
        if not repository or repository.startswith("/") or len(rest) > 2 or not all(rest):
            raise BadInput(
                f"{spec!r} is not hf:owner/name[:config][:split]", hint="write for example hf:openai/gsm8k:main:train"
            )
        self.spec, self.repository = spec, repository
        self.config = rest[0] if rest else None
        self.split = rest[1] if len(rest) == 2 else "train"
        self.name = repository.split("/")[-1]
        self.where = spec
        self.size: int | None = None

    def fingerprint(self) -> str:
        """Hash of the repository's commit and the part of it that is read."""
        import huggingface_hub

        with _HubErrors(self.spec):
            commit = huggingface_hub.HfApi().dataset_info(self.repository).sha
        return hash_json([self.repository, commit, self.config, self.split])

    def blocks(self, moved: Callable[[int], None] = no_report) -> Iterator[Block]:
        import datasets

        with _HubErrors(self.spec):
            stream = datasets.load_dataset(self.repository, self.config, split=self.split, streaming=True)
            line = 1
            for batch in stream.with_format("arrow").iter(batch_size=BLOCK_ROWS):
                yield arrow_block(batch, line)
                line += batch.num_rows
        if line == 1:
            raise BadInput("the split is empty", where=self.spec, hint="name another split")


class _HubErrors:
    """Tells a hub that cannot be reached from a data set that does not exist."""

    def __init__(self, spec: str) -> None:
        self.spec = spec

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is None or not isinstance(error, Exception) or isinstance(error, BadInput):
            return
        names = {base.__name__ for base in type(error).__mro__}
        text = (str(error).splitlines() or [type(error).__name__])[0]
        if names & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
            raise NotFound("no such data set on the hub", where=self.spec, hint="check owner and name") from None
        if names & {
            "ConnectionError",
            "OfflineModeIsEnabled",
            "LocalEntryNotFoundError",
            "TimeoutException",
            "TransportError",
        }:
            raise Unavailable(
                f"the Hugging Face hub is not reachable ({text})",
                where=self.spec,
                hint="connect, unset HF_HUB_OFFLINE, or download the data and name the file",
            ) from None
        if isinstance(error, ValueError):  # an unknown config or split: the message lists those there are
            raise BadInput(text, where=self.spec, hint="write hf:owner/name:config:split") from None
