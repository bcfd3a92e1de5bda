"""kohya's metadata: what it says of a network's ranks and alphas, made true."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence


def kohya_metadata(metadata: Mapping[str, str], ranks: Sequence[int]) -> Iterator[tuple[str, str]]:
    """The metadata of the source, with what it says of the network true of factors of `ranks`, whose scale is 1."""
    yield from metadata.items()
    if "ss_network_module" in metadata:
        yield "ss_network_module", "networks.lora"
        yield "ss_network_dim", one_or_dynamic(ranks)
        yield "ss_network_alpha", metadata.get("ss_network_alpha", "") if not ranks else "Dynamic"
        yield "ss_network_args", "{}"


def one_or_dynamic(values: Iterable[float]) -> str:
    """kohya's word for ranks or alphas: the one that all modules have, or Dynamic."""
    distinct = set(values)
    return f"{min(distinct):g}" if len(distinct) == 1 else "Dynamic"
