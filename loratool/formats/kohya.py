"""kohya's metadata on a network's ranks and alphas, made true of the adapter that is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

MODULE = "ss_network_module"
DIM = "ss_network_dim"
ALPHA = "ss_network_alpha"
ARGS = "ss_network_args"
"""The keys of sd-scripts for the trainer's module, the rank, the alpha, and the module's arguments."""


def new_network(ranks: Sequence[int]) -> dict[str, str]:
    """The metadata that kohya's tools look for in a new file of LoRA whose alphas are the ranks."""
    rank = common_or_dynamic(ranks)
    return {MODULE: "networks.lora", DIM: rank, ALPHA: rank}


def of_new_factors(metadata: Mapping[str, str], ranks: Sequence[int]) -> dict[str, str]:
    """The metadata of the source, changed to describe LoRA of `ranks`, whose scale is 1."""
    if MODULE not in metadata:
        return dict(metadata)
    # The arguments describe the network as it was, by LyCORIS's `algo` for one.
    alpha = "Dynamic" if ranks else metadata.get(ALPHA, "")
    return {**metadata, MODULE: "networks.lora", DIM: common_or_dynamic(ranks), ALPHA: alpha, ARGS: "{}"}


def of_other_ranks(
    metadata: Mapping[str, str], before: set[int], after: set[int], alphas: set[float], *, folded: bool
) -> dict[str, str]:
    """The entries to change for ranks that were `before` and are `after`, and for alphas that changed with them or are
    `folded` into the factors."""
    if DIM not in metadata:
        return {}
    said = {DIM: common_or_dynamic(after)} if after != before else {}
    return {**said, ALPHA: common_or_dynamic(alphas or after)} if said or folded else {}


def of_other_alphas(metadata: Mapping[str, str], alphas: Iterable[float]) -> dict[str, str]:
    """The entries to change where modules have other alphas; none for metadata without an alpha."""
    return {ALPHA: common_or_dynamic(alphas)} if ALPHA in metadata else {}


def common_or_dynamic(values: Iterable[float]) -> str:
    """kohya's word for the ranks or alphas of a file: the value that all modules share, or Dynamic."""
    # The metadata has one number for the whole network; "Dynamic" is what sd-scripts' resize_lora.py writes for many.
    distinct = set(values)
    return f"{min(distinct):g}" if len(distinct) == 1 else "Dynamic"
