"""kohya's metadata: what it says of a network's ranks and alphas, made true of what is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

MODULE = "ss_network_module"
DIM = "ss_network_dim"
ALPHA = "ss_network_alpha"
ARGS = "ss_network_args"


def new_network(ranks: Sequence[int]) -> dict[str, str]:
    """What kohya's tools look for in a new file of LoRA whose alphas are their ranks."""
    rank = common_or_dynamic(ranks)
    return {MODULE: "networks.lora", DIM: rank, ALPHA: rank}


def of_new_factors(metadata: Mapping[str, str], ranks: Sequence[int]) -> dict[str, str]:
    """The metadata of the source, with what it says of the network true of LoRA of `ranks`, whose scale is 1."""
    if MODULE not in metadata:
        return dict(metadata)
    alpha = "Dynamic" if ranks else metadata.get(ALPHA, "")
    return {**metadata, MODULE: "networks.lora", DIM: common_or_dynamic(ranks), ALPHA: alpha, ARGS: "{}"}


def of_other_ranks(
    metadata: Mapping[str, str], before: set[int], after: set[int], alphas: set[float], *, folded: bool
) -> dict[str, str]:
    """What is no longer true of ranks that were `before` and are `after`, and of their alphas, where these changed or are
    `folded` into the factors."""
    if DIM not in metadata:
        return {}
    said = {DIM: common_or_dynamic(after)} if after != before else {}
    return {**said, ALPHA: common_or_dynamic(alphas or after)} if said or folded else {}


def of_other_alphas(metadata: Mapping[str, str], alphas: Iterable[float]) -> dict[str, str]:
    """What is no longer true where modules have other alphas."""
    return {ALPHA: common_or_dynamic(alphas)} if ALPHA in metadata else {}


def common_or_dynamic(values: Iterable[float]) -> str:
    """kohya's word for ranks or alphas: the one that all modules have, or Dynamic."""
    distinct = set(values)
    return f"{min(distinct):g}" if len(distinct) == 1 else "Dynamic"
