"""Adapters and models on the Hugging Face hub, as paths: huggingface_hub downloads them, once, into its own cache.

A name is `hf:ORG/NAME[@REVISION][/FILE]`. Only what can be read is downloaded: an adapter's config and weights, a model's
safetensors files with its configs, or the one safetensors file that there is. No pickles. huggingface_hub is an extra,
loratool[hub].
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from loratool.errors import InvalidFile, LoratoolError, first_few
from loratool.files.adapter_files import CONFIG_NAME, WEIGHTS
from loratool.files.layout import INDEX_SUFFIX, PIPELINE, SINGLE_NAMES

if TYPE_CHECKING:
    from collections.abc import Sequence

_PREFIX: Final = "hf:"
NAME: Final = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?(?:/(.+))?")
ADAPTER: Final = (CONFIG_NAME, WEIGHTS[0])
"""The files of a PEFT adapter."""
MODEL: Final = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md")
"""The files of a model: weights, configs, and a tokenizer's files."""
VARIANTS: Final = ("*.fp16.safetensors", "*.bf16.safetensors", "*.non_ema.safetensors", "*/*.fp16-*.safetensors")
"""Copies of the weights in other dtypes, or without the moving average, which a pipeline's folders hold beside them."""

_T = TypeVar("_T")


def is_named(text: str) -> bool:
    """Whether `text` is a name on the hub, by its prefix."""
    return text.startswith(_PREFIX)


def might_be_named(text: str) -> bool:
    """Whether `text`, a path that does not exist, has the form ORG/NAME and no folder ORG exists."""
    found = re.fullmatch(r"([\w-][\w.-]*)/[\w-][\w.-]*(@[\w.-]+)?", text)
    return found is not None and not Path(found[1]).exists() and not text.endswith((".safetensors", ".bin", ".json"))


def fetch(text: str) -> Path:
    """Downloads what `text` names on the hub and returns its path in the hub's cache; raises `LoratoolError` where that
    fails."""
    found = NAME.fullmatch(text.removeprefix(_PREFIX))
    if not found or ".." in (found[3] or "").split("/"):
        raise LoratoolError(f"{text}: expected hf:ORG/NAME, hf:ORG/NAME@REVISION, or either with /FILE behind it")
    if find_spec("huggingface_hub") is None:
        raise LoratoolError(f"{text}: needs huggingface_hub; pip install 'loratool[hub]', or download it yourself")
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    if not sys.stderr.isatty():
        disable_progress_bars()
    name, revision, file = found.groups()
    return _Repository(text, name, revision).path(file)


class _Repository:
    """One repository at one revision."""

    def __init__(self, text: str, name: str, revision: str | None) -> None:
        self.text = text
        self.name = name
        self.revision = revision
        self.endpoint = os.environ.get("HF_ENDPOINT") or None

    def path(self, file: str | None) -> Path:
        """Downloads `file`, or with None whatever there is to read, and returns its path."""
        if file is not None:
            return self._file(file)
        # From the clearest mark to the vaguest: a PEFT config, a pipeline's index, a lone file, a model's weights.
        files = self._ask(self._files)
        if files is None:
            return self._ask(self._cached_path)
        if CONFIG_NAME in files:
            return self._folder(ADAPTER, ())
        if PIPELINE in files:
            return self._folder([f"*/{pattern}" for pattern in MODEL] + [PIPELINE], VARIANTS)
        top = [name for name in files if name.endswith(".safetensors") and "/" not in name]
        if len(top) == 1 and "config.json" not in files:
            return self._file(top[0])
        if any(name.endswith(INDEX_SUFFIX) for name in files) or SINGLE_NAMES[0] in top:
            # Not its subfolders, where repositories keep the same weights in other layouts.
            return self._folder(MODEL, ("*/*",))
        raise InvalidFile(f"{self.text}: {_no_choice(self.text, files, top)}")

    def _files(self) -> list[str] | None:
        """The names of the repository's files; None in huggingface_hub's offline mode."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import OfflineModeIsEnabled

        try:
            siblings = HfApi(endpoint=self.endpoint).model_info(self.name, revision=self.revision).siblings
        except OfflineModeIsEnabled:
            return None
        names = [sibling.rfilename for sibling in siblings or ()]
        if not all(isinstance(name, str) for name in names):
            raise TypeError("a file of it has no name")
        return names

    def _cached_path(self) -> Path:
        """The path of what an earlier run downloaded: a lone safetensors file, else the folder."""
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(self.name, revision=self.revision, local_files_only=True))
        names = [entry.name for entry in folder.iterdir() if entry.suffix == ".safetensors"]
        alone = len(names) == 1 and not any((folder / name).exists() for name in (CONFIG_NAME, "config.json"))
        return folder / names[0] if alone else folder

    def _file(self, file: str) -> Path:
        from huggingface_hub import hf_hub_download

        return self._ask(lambda: Path(hf_hub_download(self.name, file, revision=self.revision, endpoint=self.endpoint)))

    def _folder(self, wanted: Sequence[str], unwanted: Sequence[str]) -> Path:
        from huggingface_hub import snapshot_download

        def download() -> Path:
            folder = snapshot_download(
                self.name,
                revision=self.revision,
                allow_patterns=list(wanted),
                ignore_patterns=list(unwanted),
                endpoint=self.endpoint,
            )
            return Path(str(folder))

        return self._ask(download)

    def _ask(self, ask: Callable[[], _T]) -> _T:
        """The result of `ask`, with errors of the hub as `LoratoolError`."""
        try:
            return ask()
        except Exception as error:
            words = _words(error, self.revision)
            # A captive portal, a proxy or a mirror may answer anything, on which huggingface_hub stumbles.
            if words is None and isinstance(error, ValueError | TypeError | LookupError | AttributeError | RecursionError):
                words = f"what answers there is not the hub: {type(error).__name__}: {str(error)[:200]}"
            if words is None:
                raise
            raise LoratoolError(f"{self.text}: {words}") from error


def _words(error: Exception, revision: str | None) -> str | None:
    """The meaning of an error of the hub, in words; None for any other error."""
    from huggingface_hub import errors

    # Subclasses first: huggingface_hub's gated repository is one not found, and most of its errors are OSErrors.
    meanings: tuple[tuple[type[Exception], str], ...] = (
        (errors.GatedRepoError, "asks to accept its terms; do so on its page, then `hf auth login`"),
        (errors.RevisionNotFoundError, f"has no revision {revision}"),
        (errors.RepositoryNotFoundError, "is not on the hub, or is private: `hf auth login` first"),
        (errors.LocalEntryNotFoundError, "is not in the cache, and the hub cannot be reached"),
        (errors.EntryNotFoundError, "has no such file"),
        (errors.HfHubHTTPError, f"the hub refuses: {str(error)[:300]}"),
        (errors.HFValidationError, str(error)[:300]),
        (OSError, f"the hub cannot be reached: {str(error)[:300]}"),
    )
    known = next((words for kind, words in meanings if isinstance(error, kind)), None)
    # huggingface_hub 0 speaks HTTP through requests, and 1 through httpx; the errors of either come through as they are.
    if known is None and type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3")):
        return f"the hub cannot be reached: {str(error)[:300]}"
    return known


def _no_choice(text: str, files: Iterable[str], top: Sequence[str]) -> str:
    every = [name for name in files if name.endswith(".safetensors")]
    if every:
        return f"holds several safetensors files ({first_few(every)}); name one, such as {text}/{(top or every)[0]}"
    return "holds no safetensors file"
