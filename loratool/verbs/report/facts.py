"""The facts that a report shows of one adapter, gathered from the verbs that compute them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loratool.adapter.adapter import Adapter
from loratool.adapter.load import load_listing
from loratool.base.base import BaseCheckpoint
from loratool.errors import InvalidFile, LoratoolError
from loratool.files.layout import Layout
from loratool.files.strict_json import strict_json
from loratool.keys.listing import open_input
from loratool.text import count
from loratool.verbs.delta.delta import DeltaReport, delta
from loratool.verbs.hash import Hashes, hashes_of
from loratool.verbs.inspect.block_map import BlockMap, block_map
from loratool.verbs.inspect.inspect import AdapterReport, inspect_adapter
from loratool.verbs.resize import FrontierReport, frontier

_TRAINING: Final[Mapping[str, str]] = {
    "modelspec.title": "title", "modelspec.author": "author", "modelspec.date": "date", "modelspec.license": "licence",
    "modelspec.trigger_phrase": "trigger phrase", "modelspec.usage_hint": "usage", "ss_sd_model_name": "trained on",
    "ss_base_model_version": "base", "ss_network_module": "network", "ss_network_args": "its arguments",
    "ss_num_train_images": "images", "ss_num_epochs": "epochs", "ss_steps": "steps", "ss_learning_rate": "learning rate",
    "ss_unet_lr": "of the U-Net", "ss_text_encoder_lr": "of the text encoder", "ss_optimizer": "optimizer",
    "ss_lr_scheduler": "schedule", "ss_resolution": "resolution", "ss_clip_skip": "clip skip",
    "ss_noise_offset": "noise offset", "ss_mixed_precision": "precision", "ss_seed": "seed",
    "ss_training_comment": "comment",
}  # fmt: skip
"""Metadata that people ask after in a training, and its names in words, in the order of the page."""
TAGS: Final = 60
"""The number of tags in the cloud, the most frequent ones."""


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """One adapter: the bytes of its file, what `inspect` says, the map of its blocks, its changes with their spectra, and
    the frontier of size and error; of the last two the error's message where they cannot be computed. `tags` are the most
    frequent tags of its training, with their counts."""

    adapter: Adapter
    report: AdapterReport
    nbytes: int
    about: tuple[tuple[str, str], ...]
    training: tuple[tuple[str, str], ...]
    tags: tuple[tuple[str, int], ...]
    map: BlockMap
    delta: DeltaReport | str
    frontier: FrontierReport | str


def facts_of(path: Path, base: BaseCheckpoint | None) -> AdapterFacts:
    """Gathers the facts of the adapter at `path`; raises `LoratoolError` for a checkpoint, and where it cannot be read."""
    found = open_input(path)
    if isinstance(found, Layout):
        raise InvalidFile(f"{path}: is a checkpoint; a report is about adapters")
    report, metadata = inspect_adapter(found), found.header.metadata
    hashes = hashes_of(path, found.file.weights, found.header)
    adapter = load_listing(found)
    # kohya writes what was not set too, as the text None or an empty object.
    training = [
        (name, metadata[key]) for key, name in _TRAINING.items() if metadata.get(key, "None") not in ("None", "{}", "")
    ]
    return AdapterFacts(
        adapter=adapter,
        report=report,
        nbytes=hashes.size,
        about=tuple(_about(report, hashes)),
        training=tuple(training),
        tags=tuple(_tags(metadata).most_common(TAGS)),
        map=block_map(adapter),
        # Without the base these two raise for kinds that depend on the weight; the page then says so in their place.
        delta=_or_why(lambda: delta(adapter, base=base, spectrum=True)),
        frontier=_or_why(lambda: frontier(adapter, base=base)),
    )


def _or_why(work: Any) -> Any:
    """What `work` returns, or the message of its `LoratoolError`."""
    try:
        return work()
    except LoratoolError as error:
        return str(error)


def _about(report: AdapterReport, hashes: Hashes) -> Iterator[tuple[str, str]]:
    yield "format", report.format
    yield "trainer", report.trainer or "not said in its metadata"
    yield "for", f"{report.arch.title}: {report.arch.reason}"
    yield from report.lines()
    yield "parameters", count(report.parameters)
    yield "AutoV3", hashes.letters or ""
    yield "SHA-256", hashes.sha256


def _tags(metadata: Mapping[str, str]) -> Counter[str]:
    """kohya's counts of tags, summed over all folders (ss_tag_frequency: folder to tag to count)."""
    found: Counter[str] = Counter()
    try:
        document = strict_json(metadata.get("ss_tag_frequency", "{}").encode(errors="surrogatepass"))
    except LoratoolError:
        return found
    # The document comes from strangers: what has another form is left out.
    for tags in document.values() if isinstance(document, dict) else ():
        for tag, times in tags.items() if isinstance(tags, dict) else ():
            if isinstance(times, int) and times > 0:
                found[tag.strip()] += times
    return found
