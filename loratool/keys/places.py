"""Where in a base checkpoint each module's weight lies: the base's own header is the best table of names. No torch.

Names are compared flattened, so that dotted and kohya's spelling are one. An architecture's table adds the second
naming, with q, k and v as row ranges of a stacked weight or the other way about.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final

from loratool.archs import ARCHS, Component
from loratool.archs.classes import TIE, TiedWeights, conv1d_names, model_parts, tied_weights
from loratool.archs.links import Link, parts_mentioned
from loratool.archs.llm import CONV1D, fuse_rows, is_decoder, meta, mixture_of_experts
from loratool.archs.memory import MemoryTensors, tensors_in_memory
from loratool.deltas.schema import BIAS, WEIGHT
from loratool.errors import LoratoolError
from loratool.files.header import read_json
from loratool.files.layout import Layout
from loratool.keys.detect import NamedWidth
from loratool.keys.rows import Places, WeightRows, places_in_memory, split_heads
from loratool.keys.stacks import expert_names, has_inputs_first, has_interleaved_halves
from loratool.names import COMPONENTS, ENCODERS, WHOLE, Module, base_component, candidate_names, flat, without_wrappers

Key = tuple[str, str]
"""A component, and the flattened path of a module in it."""

SAMPLED: Final = 64
"""About how many names of a base are tried on every table, before all names are tried on the tables that explain most."""

ENDINGS: Final = ((".weight", WEIGHT), (".bias", BIAS), (".scale", WEIGHT), ("_weight", WEIGHT), ("_bias", BIAS))
"""How the names of tensors end, and which parameter each ending stands for: behind a dot for modules (BFL calls the weight
of a norm `scale`), behind an underscore for raw parameters like OpenCLIP's in_proj_weight."""
HEAD: Final = "lm_head"
"""The output layer, which may be tied to the input embedding."""
EMBEDDING_STEMS: Final = ("embed_tokens.weight", "wte.weight")
"""How the name of an input embedding's weight ends."""


@dataclass(frozen=True, slots=True)
class Tie:
    """Weights that are one in memory: `members` are their names there by flattened path and parameter, `stored` the tensors
    of the base that hold them, of one member or of several."""

    weights: TiedWeights
    members: Mapping[Key, str] = field(hash=False)
    stored: Mapping[Key, str] = field(hash=False)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the weights in memory."""
        return self.weights.names


class WeightIndex:
    """The places of all modules of one base, for `find`; `own` maps each tensor's name to all of its rows, as stored."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._paths: dict[str, dict[str, str]] = {}
        self._places: dict[str, dict[Key, Places]] = {WEIGHT: {}, BIAS: {}}
        self._doubles: dict[Key, tuple[str, str]] = {}
        self.own: dict[str, WeightRows] = {}
        for name in layout.tensors:
            self._add(name)
        # Links come last: they give further names to places that must be known by then.
        for component, paths in self._paths.items():
            self._add_links(component, frozenset(paths.values()))

    def find(self, module: Module, parameter: str = WEIGHT) -> Places:
        """The places that the weight or bias of `module` takes, in the order of its rows; empty where the base has none.

        Raises `LoratoolError` where two tensors of the base go by the module's name.
        """
        for path in _spellings(module.path):
            if places := self._find(replace(module, path=path), parameter):
                return places
        return ()

    def _find(self, module: Module, parameter: str) -> Places:
        """The places of `module` under this very path, in memory's names or in those of the base."""
        # Adapters speak of modules in memory, which other modules may be called on disk.
        for path in self.paths_in_memory(module.path):
            if places := self._memory[parameter].get(flat(path)):
                return places
        for key in self._readings(module):
            # A double is an error only where it is asked for; tensors that no adapter changes may be called anything.
            if key in self._doubles:
                one, other = self._doubles[key]
                raise LoratoolError(f"{self._layout.root}: {one} and {other} both go by the name of {module}")
            if places := self._places[parameter].get(key) or self._in_stack(key, parameter):
                return places
        return ()

    def _in_stack(self, key: Key, parameter: str) -> tuple[WeightRows, ...]:
        """The place of a single expert's weight in a stack of the base; empty where there is none.

        Raises `LoratoolError` where only the model's class could tell the expert's rows, and no config names it.
        """
        component, path = key
        for name in expert_names(path) if parameter == WEIGHT else ():
            stored = self._places[WEIGHT].get((component, name.stack))
            shape = self._layout.info(stored[0].tensor).shape if stored else ()
            if not stored or len(shape) != 3 or name.expert >= shape[0]:
                continue
            tensor, turned = stored[0].tensor, has_inputs_first(self._layout, stored[0].tensor)
            by_turns = has_interleaved_halves(self._layout) if name.half is not None and turned else False
            if turned is None or by_turns is None:
                raise LoratoolError(
                    f"{self._layout.root}: which part of {tensor} is {path} only the model's class tells; put the model's "
                    "config.json beside its weights, and name the folder"
                )
            rows = WeightRows(tensor, 0, shape[2 if turned else 1], turned, expert=name.expert)
            if name.half is None:
                return (rows,)
            if by_turns:
                return (replace(rows, start=name.half, step=2),)
            half = rows.stop // 2
            return (replace(rows, start=name.half * half, stop=(name.half + 1) * half),)
        return ()

    def nearest(self, module: Module) -> str | None:
        """The module path of the base that looks most like that of `module`, for messages; None where none comes near."""
        known = {known: path for paths in self._paths.values() for known, path in paths.items()}
        close = difflib.get_close_matches(flat(module.path), known, n=1, cutoff=0.6)
        return known[close[0]] if close else None

    def find_wrapped(self, modules: Iterable[Module]) -> dict[Module, Module]:
        """Renames modules without a place by the one prefix that finds them all: wrappers move a whole model.

        A vision-language model calls `model.layers` `model.language_model.layers`; transformers 5.6 dropped `text_model.`
        from CLIP. Empty unless exactly one prefix, put before or taken away, places every module of its component.
        """
        renamed: dict[Module, Module] = {}
        by_component: dict[str, list[Module]] = {}
        for module in modules:
            by_component.setdefault(module.component, []).append(module)
        for component, lost in by_component.items():
            # One module proposes the changes of prefix, and all modules of its component must find a place by one of them.
            found = [tried for change in self._changes(component, lost[0]) if (tried := self._all_placed(lost, change))]
            # Of two changes that both place everything, either would be a guess.
            if len(found) == 1:
                renamed.update(found[0])
        return renamed

    @cached_property
    def _made(self) -> list[tuple[MemoryTensors, list[tuple[str, Places]]]]:
        """What has another name in memory, or is made of several tensors, with the places of each name."""
        found = tensors_in_memory(self._layout.config, self._layout.tensors)
        return [(made, list(places_in_memory(made, self.own, self._layout))) for made in found]

    @cached_property
    def _memory(self) -> dict[str, dict[str, Places]]:
        """The places of what has another name in memory, by parameter and the flattened path of its module there."""
        found: dict[str, dict[str, Places]] = {WEIGHT: {}, BIAS: {}}
        for _, named in self._made:
            for name, places in named:
                module, parameter = module_of(name)
                found[parameter].setdefault(flat(module.path), places)
        return found

    @cached_property
    def _by_tensor(self) -> dict[str, list[tuple[str, Places]]]:
        """The names in memory that take rows of each tensor; not those of single experts, which no tensor in memory has."""
        found: dict[str, list[tuple[str, Places]]] = {}
        for made, named in self._made:
            for name, places in named:
                if name in made.names:
                    for place in places:
                        found.setdefault(place.tensor, []).append((name, places))
        return found

    def in_memory(self, tensor: str) -> list[tuple[str, Places]]:
        """What takes rows of a tensor, by its name in memory, with all of its places; the tensor itself where memory has the
        same name for it."""
        return self._by_tensor.get(tensor, [(tensor, (self.own[tensor],))])

    @cached_property
    def _prefix(self) -> str:
        """What the class in config.json calls the model without its head, with a dot behind; "" for an unknown class."""
        parts = model_parts(self._layout.config)
        prefix = parts[0].facts.get("prefix", "") if parts else ""
        return f"{prefix}." if prefix else ""

    def paths_in_memory(self, path: str) -> Iterator[str]:
        """The path, and the same with or without the base model's prefix: heads are put on bare models, and taken off."""
        yield path
        if self._prefix:
            yield path.removeprefix(self._prefix) if path.startswith(self._prefix) else self._prefix + path

    def _readings(self, module: Module) -> Iterator[Key]:
        """The keys by which the base may know `module`: first as its name is read; then, where the name or the base does not
        tell components apart, in the other components."""
        path = flat(module.path)
        yield from ((component, flat(path)) for component, path in candidate_names(module))
        # A raw parameter that PEFT names in full, such as the `weight` of JetMoE's stacks.
        if path.endswith("_weight"):
            yield module.component, path.removesuffix("_weight")
        if module.component == WHOLE:
            yield from ((component, path) for component in COMPONENTS if component in self._paths)
            return
        # A base without prefixes has everything in the component WHOLE. What looks like an adapter's prefix may be part of
        # the path there: GPT-2's names begin with `transformer.`, as those of diffusers' pipelines do.
        yield WHOLE, path
        yield WHOLE, flat(module.stem)
        if module.component in ENCODERS and module.component not in self._paths:
            # FLUX's T5 is the second text encoder to diffusers, the third to kohya and ComfyUI.
            yield from ((component, path) for component in ENCODERS if component in self._paths)

    @cached_property
    def ties(self) -> tuple[Tie, ...]:
        """The weights that are one in memory and of which the base stores one at least."""
        config = self._layout.config
        declared = tied_weights(config) or _usual_tie(config, self._layout.tensors)
        found = []
        for weights in declared:
            keys = [(name, *module_of(name)) for name in weights.names]
            members = {(flat(module.path), parameter): name for name, module, parameter in keys}
            places = {(flat(module.path), parameter): self.find(module, parameter) for _, module, parameter in keys}
            stored = {key: where[0].tensor for key, where in places.items() if where}
            if stored:
                found.append(Tie(weights, members, stored))
        return tuple(found)

    def tie_of(self, module: Module, parameter: str = WEIGHT) -> Tie | None:
        """The tie that a weight is part of, None without one."""
        paths = [flat(path) for path in self.paths_in_memory(module.path)]
        return next((tie for tie in self.ties for path in paths if (path, parameter) in tie.members), None)

    def find_twin(self, module: Module, parameter: str = WEIGHT) -> Places:
        """The places of `module`, or of a weight that is the same in memory where the base stores only that one."""
        if places := self.find(module, parameter):
            return places
        tie = self.tie_of(module, parameter)
        return (self.own[next(iter(tie.stored.values()))],) if tie else ()

    def _add(self, name: str) -> None:
        module, parameter = module_of(name)
        component, path = module.component, module.path
        key = component, flat(path)
        # Flattening may make two paths one, and so may two endings that mean the same parameter.
        before = self._places[parameter].get(key)
        if before:
            self._doubles[key] = before[0].tensor, name
        self._paths.setdefault(component, {})[flat(path)] = path
        shape = self._layout.info(name).shape
        transposed = parameter == WEIGHT and self._is_conv1d(path, shape)
        rows = shape[1 if transposed else 0] if shape else 1
        self.own[name] = WeightRows(name, 0, rows, transposed)
        self._places[parameter][key] = (self.own[name],)

    def _is_conv1d(self, path: str, shape: tuple[int, ...]) -> bool:
        """Whether a weight is that of a Conv1D, stored as (in, out): by the model's class, else by its name, and by the
        shape of a c_attn."""
        block, _, leaf = path.rpartition(".")
        if leaf not in CONV1D or len(shape) != 2:
            return False
        if self._conv1d is not None:
            return any(path.startswith(scope) and leaf in names for scope, names in self._conv1d)
        # The block's c_attn decides for all of its layers: it stacks q, k and v along the output, so the longer side is the
        # output. A c_proj of attention is square, and its own shape says nothing.
        attention = block.replace(".mlp", ".attn") + ".c_attn.weight"
        stored = self._layout.tensors.get(attention)
        return stored is not None and stored[1].shape[1:] == (3 * stored[1].shape[0],)

    @cached_property
    def _conv1d(self) -> list[tuple[str, frozenset[str]]] | None:
        return conv1d_names(self._layout.config)

    def _add_links(self, component: str, paths: frozenset[str]) -> None:
        """Adds the names that the places of a component have in the namings that the base is not in."""
        table, naming = _best_table(component, paths)
        namings = table.links if table else {}
        # Parts come first: a base in the original's naming then has its wholes in every other naming, such as
        # ComfyUI's own for Hunyuan, by way of diffusers' parts.
        both = (*mixture_of_experts(paths), *fuse_rows(paths, self._heads()))
        parted = (*namings.get(naming, ()), *both, *meta(paths))
        joined = (*(link for links in namings.values() for link in links), *both)
        for places in self._places.values():
            for link in parted:
                self._alias_parts(component, link, places)
            for link in joined:
                self._alias_whole(component, link, places)

    def _alias_parts(self, component: str, link: Link, places: dict[Key, Places]) -> None:
        """Gives the parts of a link their row ranges of the whole, where the base stores the whole as the original does."""
        stored = places.get((component, flat(link.whole)))
        if stored is None:
            return
        if link.rotary:
            # Without the width of a head nobody knows which rows belong together, and the module stays without a place.
            if width := self._head_width():
                places[component, flat(link.parts[0])] = tuple(split_heads(stored[0], width))
            return
        whole = self._as_transposed(stored[0]) if link.transposed else stored[0]
        for part, place in zip(link.parts, _cut_rows(whole, link), strict=True):
            places[component, flat(part)] = _swap_halves((place,)) if link.swapped else (place,)

    def _alias_whole(self, component: str, link: Link, places: dict[Key, Places]) -> None:
        """Gives the whole of a link the places of its parts, in order, where the base stores them as diffusers does."""
        parts = [places.get((component, flat(part))) for part in link.parts]
        joined = tuple(place for part in parts if part for place in part)
        # What is stored under the name of the whole goes before what its parts would make up.
        if all(parts) and not link.transposed:
            places.setdefault((component, flat(link.whole)), _swap_halves(joined) if link.swapped else joined)

    def _as_transposed(self, place: WeightRows) -> WeightRows:
        return WeightRows(place.tensor, 0, self._layout.info(place.tensor).shape[-1], transposed=True)

    def _head_width(self) -> int:
        """The rows of an attention head in a Llama under Meta's names: by rope.freqs, else by params.json; 0 if unknown."""
        # Rotary embeddings have one frequency for each pair of rows.
        if "rope.freqs" in self._layout.tensors:
            return 2 * self._layout.info("rope.freqs").shape[0]
        folder = self._layout.root if self._layout.is_folder else self._layout.root.parent
        params = read_json(folder / "params.json") if (folder / "params.json").is_file() else {}
        dim, heads = params.get("dim"), params.get("n_heads")
        return dim // heads if isinstance(dim, int) and isinstance(heads, int) and heads > 0 else 0

    def _heads(self) -> tuple[int, int]:
        """The numbers of heads of queries, and of keys and values, by the base's config.json; (0, 0) if unknown."""
        config = self._layout.config
        # Vision-language models keep what is said of their language model one level down.
        text = config.get("text_config", config)
        queries = text.get("num_attention_heads") if isinstance(text, dict) else None
        keys = text.get("num_key_value_heads", queries) if isinstance(text, dict) else None
        if not isinstance(queries, int) or not isinstance(keys, int) or queries <= 0 or keys <= 0:
            return 0, 0
        return queries, keys

    def _changes(self, component: str, module: Module) -> set[tuple[str, str]]:
        """The changes of prefix (one to take away, one to put before) that would give `module` a path of the base."""
        path = flat(module.path)
        # Prefixes end where a name ends: at a dot, which is an underscore in flattened paths.
        changes = set()
        for known in self._paths.get(component, self._paths.get(WHOLE, {})):
            if known.endswith(f"_{path}"):
                changes.add(("", known.removesuffix(path)))
            elif path.endswith(f"_{known}"):
                changes.add((path.removesuffix(known), ""))
        return changes

    def _all_placed(self, modules: list[Module], change: tuple[str, str]) -> dict[Module, Module]:
        """`modules` renamed by one change of prefix; empty unless the change applies to all and places all."""
        away, before = change
        renamed = {
            module: replace(module, path=before + flat(module.path).removeprefix(away))
            for module in modules
            if flat(module.path).startswith(away)
        }
        placed = all(self.find(new) or self.find(new, BIAS) for new in renamed.values())
        return renamed if len(renamed) == len(modules) and placed else {}


def _usual_tie(config: Mapping[str, Any], names: Iterable[str]) -> tuple[TiedWeights, ...]:
    """The tie of output layer and input embedding by their usual names, for a class that transformers does not have."""
    # Only the class tells a model with a tied head from a bare one, which has an embedding and no head.
    architectures = config.get("architectures") or [""]
    if model_parts(config) or not str(architectures[0]).endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        return ()
    embedding = next((name for name in names if name.endswith(EMBEDDING_STEMS)), None)
    head = next((name for name in names if name.endswith(f"{HEAD}.weight")), f"{HEAD}.weight")
    return (TiedWeights((head, embedding), said=bool(config.get(TIE, False))),) if embedding else ()


def module_of(name: str) -> tuple[Module, str]:
    """The module that a base's tensor belongs to, and whether the tensor is the module's weight or its bias."""
    component, _, rest = base_component(without_wrappers(name))
    ending, parameter = next(((ending, parameter) for ending, parameter in ENDINGS if rest.endswith(ending)), ("", WEIGHT))
    return Module(component, rest.removesuffix(ending), name.removesuffix(ending)), parameter


def _spellings(path: str) -> Iterator[str]:
    """The paths that a module's name may mean: PEFT calls what it wrapped `base_layer`, and gives nn.MultiheadAttention's
    stack of q, k and v the name of the module, or the parameter's own (PEFT tuners/lora/layer.py)."""
    yield path
    bare = path.replace(".base_layer", "")
    if bare != path:
        yield bare
    yield f"{bare}.in_proj"
    if bare.endswith("in_proj_weight"):
        yield bare.removesuffix("_weight")


def _best_table(component: str, paths: frozenset[str]) -> tuple[Component | None, str]:
    """The table that explains the most of a component's module paths, and the naming of the paths ("" for diffusers'); no
    table where none explains any."""
    # Language models have no table: `archs.llm` makes their links from the paths themselves.
    if component == WHOLE and any(map(is_decoder, paths)):
        return None, ""
    candidates = [candidate for arch in ARCHS for candidate in arch.components if _may_be(component, candidate)]
    # A sample rules most tables out; those that explain the most of it are compared on all paths.
    sample = sorted(paths)[:: max(1, len(paths) // SAMPLED)]
    scores = [sum(candidate.read_name(path) is not None for path in sample) for candidate in candidates]
    best: tuple[int, Component | None, str] = (0, None, "")
    for candidate, score in zip(candidates, scores, strict=True):
        if score == max(scores):
            best = max(best, *_explain(candidate, paths), key=lambda found: found[0])
    return best[1:]


def _may_be(component: str, candidate: Component) -> bool:
    """Whether a base's component can be `candidate`; tools number text encoders differently, so any may be any."""
    return component in (WHOLE, candidate.name) or {component, candidate.name} <= set(ENCODERS)


def _explain(candidate: Component, paths: frozenset[str]) -> Iterator[tuple[int, Component, str]]:
    """For each naming of `candidate`, how many paths it explains, and how many the diffusers naming ("") does."""
    for naming, links in candidate.links.items():
        ours, theirs = (len(side & paths) for side in parts_mentioned(links))
        yield theirs, candidate, naming
        yield ours, candidate, ""


def _cut_rows(place: WeightRows, link: Link) -> Iterator[WeightRows]:
    """The row ranges of a stacked weight that its parts take, in the ratio of the link's sizes."""
    unit = place.rows // sum(link.sizes)
    start = place.start
    for size in link.sizes:
        yield replace(place, start=start, stop=start + size * unit, transposed=place.transposed)
        start += size * unit


def _swap_halves(places: Places) -> Places:
    """The two halves of a weight in the opposite order; two places are halves that were exchanged once, and go back."""
    if len(places) == 2:
        return places[1], places[0]
    middle = places[0].start + places[0].rows // 2
    return replace(places[0], start=middle), replace(places[0], stop=middle)


def inputs_of(layout: Layout) -> list[NamedWidth]:
    """The modules of a base that have a weight of two dimensions or more, and the widths of their inputs."""
    found: list[NamedWidth] = []
    # No table has a VAE or the copies of an EMA, and a table must explain every module that is listed here.
    for name, (_, info) in layout.tensors.items():
        component, prefix, rest = base_component(without_wrappers(name))
        if rest.endswith(".weight") and len(info.shape) > 1 and not prefix.startswith(("vae", "first_stage", "model_ema")):
            found.append((Module(component, rest.removesuffix(".weight"), prefix + rest), info.shape[1]))
    return found
