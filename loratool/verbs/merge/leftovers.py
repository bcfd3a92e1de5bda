"""What is left over on the base's side: layers behind the last one that an adapter changes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from loratool.adapter.adapter import Adapter
from loratool.files.layout import Layout

DEPTH: Final = "num_hidden_layers"
"""The entry of config.json that says how many layers the model has; files may hold more, which only predict more tokens."""
_LAYER: Final = re.compile(r"(\D*?)\b(\d{1,6})\.(.+)")
"""A tensor of a layer: the name of the list, the number, the rest."""
_NUMBERED: Final = re.compile(r"(?<![\w{,])\d+(?![\w}])")
"""The number of a layer, in a name or in a pattern of names."""


def unreached_layers(adapter: Adapter, changed: Iterable[str], layout: Layout) -> Iterator[str]:
    """Warnings of lists of layers of which an adapter changes the first ones alike, and none behind them: an adapter of a
    model with fewer layers fits all of those.

    `changed` are the base's tensors that the adapter changes. Nothing is said where its config chooses layers.
    """
    if _chooses_layers(adapter.config):
        return
    ours, base = _layers(changed), _layers(layout.tensors)
    for name, layers in ours.items():
        kinds, count, there = set().union(*layers.values()), len(layers), base[name]
        # One layer tells nothing of the others; and of unlike layers each has its own share of what is trained.
        alike = set(layers) == set(range(count)) and all(kinds & there[i] == layers[i] for i in layers)
        left = [i for i in there if i >= count and kinds & there[i]]
        if count > 1 and alike and left and count not in _depths(layout.config):
            yield (
                f"{adapter.path}: the adapter changes layers 0 to {count - 1} of {len(there)} ({name}*), all of those alike "
                "and none behind them: was it trained on a model with fewer layers?"
            )


def _layers(names: Iterable[str]) -> dict[str, dict[int, set[str]]]:
    """For each list of layers, and each layer's number, the rests of its tensors' names."""
    found: dict[str, dict[int, set[str]]] = {}
    for name in names:
        if layer := _LAYER.fullmatch(name):
            found.setdefault(layer[1], {}).setdefault(int(layer[2]), set()).add(layer[3])
    return found


def _chooses_layers(config: Mapping[str, Any]) -> bool:
    """Whether PEFT's config names the layers to change, by their numbers or in its target_modules."""
    targets = config.get("target_modules") or []
    # The rest of a config is not checked: what is no list names no layer.
    names = targets if isinstance(targets, list) else [targets]
    return config.get("layers_to_transform") is not None or any(_NUMBERED.search(str(name)) for name in names)


def _depths(config: Mapping[str, Any]) -> set[Any]:
    """The numbers of layers that a config, and the configs in it, give."""
    inner = [value for value in config.values() if isinstance(value, Mapping)]
    return {each[DEPTH] for each in (config, *inner) if isinstance(each.get(DEPTH), int)}
