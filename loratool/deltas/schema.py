"""What each kind of delta is made of: its leaves, and its rank and shape as the leaves' shapes give them. No torch.

A *leaf* is one factor of a module under its loratool name (`down`, `up`, `alpha` …); how files spell leaves is the
business of `formats/`. `explain` sorts the leaves of one module into the deltas that they make up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt, prod
from typing import Any, Final

from loratool.deltas.forms import MOST_KERNEL, require_form
from loratool.errors import InvalidAdapter

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

WEIGHT: Final = "weight"
BIAS: Final = "bias"
ANY: Final = -1
"""In a delta's shape: a dimension that only the weight knows."""


OVER_RANK: Final = "over rank"
"""Alpha over the rank multiplies the product of the factors."""
CONSTRAINT: Final = "constraint"
"""Alpha bounds how far an orthogonal delta turns."""
IGNORED: Final = "ignored"
"""An alpha may stand beside the leaves, and means nothing."""


@dataclass(frozen=True, slots=True)
class Kind:
    """The row of a kind: the leaves that the kind needs and may have, what their shapes say, and the class that computes it.

    `shape` gives the shape of the weight that is changed, (out, in, *kernel), or None where only the base knows;
    `rank` is None for kinds without one. Both raise `InvalidAdapter` where the leaves do not fit each other.
    `computed_by` is the module and the class in `deltas`, `alpha` what an alpha beside the leaves means, and
    `module_alpha` says that the scale is that of the module's factors. `writer` is who writes it, in words.
    """

    name: str
    required: frozenset[str]
    optional: frozenset[str]
    shape: Callable[[Shapes], Shape | None]
    computed_by: str
    rank: Callable[[Shapes], int | None] = lambda shapes: None
    parameter: str = WEIGHT
    alpha: str = OVER_RANK
    module_alpha: bool = False
    writer: str = ""


@dataclass(frozen=True, slots=True)
class Given:
    """What the leaves of a module do not say, and whoever reads the file does: the same for every kind.

    `scale` multiplies the product of the factors (None: the file gives none), and `alpha` is the alpha behind it. `rank` is
    the config's, `stacked` says that the weight stacks experts, and `stack_rule` along which axis the factors' inputs lie
    (`formats.peft`; "": nobody says). `tokens` are the rows that are trained, `neumann_terms`
    the length of the series that stands for a Cayley transform (None: nobody says; 0: the transform itself),
    `multiplies_inputs` whether (IA)³ acts on inputs (None: the shape tells), and `slots` which slots of a fused weight.
    """

    scale: float | None = None
    alpha: float | None = None
    rank: int = 0
    stacked: bool = False
    stack_rule: str = ""
    tokens: tuple[int, ...] = ()
    neumann_terms: int | None = None
    multiplies_inputs: bool | None = None
    slots: tuple[bool, ...] = ()


@dataclass(frozen=True, slots=True)
class DeltaSpec:
    """One delta of one module as its leaves' shapes describe it; `leaves` are the names of its leaves."""

    kind: Kind
    leaves: tuple[str, ...]
    shape: Shape | None
    rank: int | None

    @property
    def magnitude(self) -> str | None:
        """The leaf that makes a DoRA of the delta, if any."""
        return next((leaf for leaf in self.leaves if leaf in DORA.split()), None)

    @property
    def label(self) -> str:
        """What people call such a delta."""
        if "reshape_weight" in self.leaves:
            return f"{self.kind.name} + enlarge"
        dora = self.magnitude is not None
        return "dora" if dora and self.kind.name == "lora" else f"{self.kind.name} + dora" if dora else self.kind.name


def _kind(
    name: str,
    computed_by: str,
    required: str,
    optional: str = "",
    *,
    shape: Callable[[Shapes], Shape | None],
    rank: Callable[[Shapes], int | None] = lambda shapes: None,
    **facts: Any,
) -> Kind:
    return Kind(name, frozenset(required.split()), frozenset(optional.split()), shape, computed_by, rank, **facts)


def _unknown(shapes: Shapes) -> Shape | None:
    """Only the base knows the shape."""
    return None


def _of(leaf: str) -> Callable[[Shapes], Shape]:
    return lambda shapes: shapes[leaf]


def _rows(leaf: str) -> Callable[[Shapes], int]:
    return lambda shapes: shapes[leaf][0]


def _lora_rank(shapes: Shapes) -> int:
    down, up = shapes["down"], shapes["up"]
    if not 2 <= len(down) <= 2 + MOST_KERNEL or not 2 <= len(up) <= 2 + MOST_KERNEL:
        raise InvalidAdapter(f"down {list(down)} and up {list(up)} must have 2 to {2 + MOST_KERNEL} dimensions")
    if down[0] == 0:
        raise InvalidAdapter(f"rank 0: down is {list(down)}, up {list(up)}")
    if down[0] != up[1]:
        swapped = " (are down and up swapped?)" if up[0] == down[1] else ""
        raise InvalidAdapter(f"ranks are unlike: down {list(down)} gives {down[0]}, up {list(up)} gives {up[1]}{swapped}")
    return down[0]


def _lora_shape(shapes: Shapes) -> Shape:
    rank, down, up = _lora_rank(shapes), shapes["down"], shapes["up"]
    if prod(up[2:]) != 1:
        raise InvalidAdapter(f"up {list(up)} has a kernel; only down or mid may have one")
    mid = shapes.get("mid")
    # Without a core the kernel is in `down` (LoCon); with one both factors are 1×1, and the kernel is in the core (Tucker).
    if mid is None:
        return (up[0], *down[1:])
    if mid[:2] != (rank, rank) or len(mid) != len(down) or prod(down[2:]) != 1:
        raise InvalidAdapter(f"mid {list(mid)} does not fit between down {list(down)} and up {list(up)}")
    return (up[0], down[1], *mid[2:])


def _embedding_rank(shapes: Shapes) -> int:
    down, up = shapes["embedding_down"], shapes["embedding_up"]
    if len(down) != 2 or len(up) != 2 or down[0] != up[1] or down[0] == 0:
        raise InvalidAdapter(f"ranks are unlike or zero: embedding A is {list(down)}, B {list(up)}")
    return down[0]


def _embedding_shape(shapes: Shapes) -> Shape:
    _embedding_rank(shapes)
    return shapes["embedding_down"][1], shapes["embedding_up"][0]


def _lokr_rank(shapes: Shapes) -> int | None:
    """The rank that LyCORIS scales by: of w1, else of w2; None where both sides are whole, and alpha is ignored."""
    for leaf in ("lokr_w1_b", "lokr_w2_b"):
        if leaf in shapes:
            return shapes[leaf][0]
    return None


def _lokr_shape(shapes: Shapes) -> Shape | None:
    for side in ("lokr_w1", "lokr_w2"):
        # Each side is either whole or a pair: having neither is as wrong as having both.
        pair = {f"{side}_a", f"{side}_b"} & shapes.keys()
        if (side in shapes) == (len(pair) == 2) or len(pair) == 1:
            raise InvalidAdapter(f"needs {side}, or {side}_a and {side}_b")
    return None


def _loha_shape(shapes: Shapes) -> Shape | None:
    if ("hada_t1" in shapes) != ("hada_t2" in shapes):
        raise InvalidAdapter("has one of hada_t1 and hada_t2 without the other")
    ranks = {shapes["hada_w1_b"][0], shapes["hada_w2_b"][0]}
    # With Tucker cores the left factors are stored as (rank, out), without them as (out, rank).
    if "hada_t1" in shapes:
        return (shapes["hada_w1_a"][1], shapes["hada_w1_b"][1], *shapes["hada_t1"][2:])
    sides = [(shapes[f"hada_w{side}_a"], shapes[f"hada_w{side}_b"]) for side in (1, 2)]
    if any(len(a) != 2 or len(b) != 2 or a[1] != b[0] for a, b in sides) or 0 in ranks:
        raise InvalidAdapter(f"ranks are unlike or zero: {', '.join(f'{list(a)} times {list(b)}' for a, b in sides)}")
    if (sides[0][0][0], sides[0][1][1]) != (sides[1][0][0], sides[1][1][1]):
        raise InvalidAdapter("the two products have unlike shapes")
    return (sides[0][0][0], sides[0][1][1])


def _glora_shape(shapes: Shapes) -> Shape:
    """The shape of a GLoRA; raises `InvalidAdapter` for old releases of LyCORIS, which stored a and b transposed."""
    rank, b1, b2 = shapes["a2"][0], shapes["b1"], shapes["b2"]
    if shapes["a1"][1] != rank or b1[1] != b2[0]:
        raise InvalidAdapter(
            f"its factors do not fit: a1 {list(shapes['a1'])}, a2 {list(shapes['a2'])}, b1 {list(b1)}, b2 {list(b2)}"
        )
    return (b1[0], *b2[1:])


def _oft_shape(shapes: Shapes) -> Shape | None:
    blocks, rescale = shapes["oft_blocks"], shapes.get("rescale")
    if len(blocks) == 4:
        _require_stages("oft_blocks", blocks)
    rows = blocks[-3] * blocks[-1]
    if rescale and rescale[0] != rows:
        raise InvalidAdapter(f"rescale {list(rescale)} is not of the {rows} rows that oft_blocks {list(blocks)} turn")
    return None


def _require_stages(leaf: str, blocks: Shape) -> None:
    """Raises `InvalidAdapter` where butterfly stages (m, n, b, b) cannot bring together what they turn: the last one takes
    half-blocks that are 2^(m − 1) apart."""
    stages, count, width = blocks[:3]
    if width % 2 or stages > 64 or count % 2 ** (stages - 1):
        raise InvalidAdapter(f"{leaf} {list(blocks)}: {count} blocks of {width} make no butterfly of {stages} stages")


def _boft_shape(shapes: Shapes) -> Shape | None:
    _require_stages("boft_r", shapes["boft_r"])
    return None


def _input_oft_shape(shapes: Shapes) -> Shape | None:
    numbers = shapes["oft_r"][1]
    width = (1 + isqrt(1 + 8 * numbers)) // 2
    if width * (width - 1) // 2 != numbers:
        raise InvalidAdapter(f"oft_r {list(shapes['oft_r'])}: {numbers} numbers are no triangle of a square block")
    return None


def _vera_shape(shapes: Shapes) -> Shape | None:
    if shapes["vera_lambda_b"][0] > shapes["vera_b"][0]:
        raise InvalidAdapter(
            f"vera_lambda_b {list(shapes['vera_lambda_b'])} has more rows than the projection, {list(shapes['vera_b'])}"
        )
    return None


def _adalora_shape(shapes: Shapes) -> Shape:
    a, b = shapes["loralib_a"], shapes["loralib_b"]
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or shapes["lora_e"][:1] != a[:1]:
        raise InvalidAdapter(f"ranks are unlike: A {list(a)}, B {list(b)}, E {list(shapes['lora_e'])}")
    return b[0], a[1]


def _loralib_shape(shapes: Shapes) -> Shape | None:
    """None, as only the weight tells which of loralib's layers this is; raises `InvalidAdapter` unless A's rows are as many
    as B's columns, or a multiple of them."""
    a, b = shapes["loralib_a"], shapes["loralib_b"]
    if len(a) != 2 or len(b) != 2 or 0 in (*a, *b) or a[0] % b[1]:
        raise InvalidAdapter(f"ranks are unlike or zero: A {list(a)}, B {list(b)}")
    return None


def _full(leaf: str, parameter: str) -> Kind:
    """The row of a full difference, stored as `leaf`."""
    # LyCORIS writes an alpha beside these, too, and does not multiply by it.
    writer = "full differences and norms: `diff`, `diff_b`, `w_norm`, `b_norm`"
    return _kind("full", "full.Full", leaf, "alpha", shape=_of(leaf), alpha=IGNORED, parameter=parameter, writer=writer)


def _replace(leaf: str, parameter: str) -> Kind:
    writer = "`modules_to_save`, trained biases, `set_weight`"
    return _kind("replace", "full.Replace", leaf, shape=_of(leaf), alpha=IGNORED, parameter=parameter, writer=writer)


DORA: Final = "magnitude dora_scale"
"""The leaves that hold the magnitude of a DoRA: PEFT's and LyCORIS's."""

KINDS: Final[Sequence[Kind]] = (
    _kind("lora", "lora.LoRA", "down up", f"mid alpha reshape_weight {DORA}", shape=_lora_shape, rank=_lora_rank,
          writer="LoRA, LoCon, Tucker (`lora_mid`), DyLoRA, rsLoRA"),
    _kind("embedding", "lora.Embedding", "embedding_down embedding_up", "alpha magnitude", shape=_embedding_shape,
          rank=_embedding_rank, writer="LoRA on an embedding (PEFT)"),
    _kind("adalora", "lora.AdaLoRA", "loralib_a loralib_b lora_e", shape=_adalora_shape, rank=_rows("loralib_a"),
          writer="AdaLoRA (PEFT)"),
    _kind("vera", "lora.VeRA", "vera_lambda_b vera_lambda_d vera_a vera_b", shape=_vera_shape, rank=_rows("vera_lambda_d"),
          writer="VeRA with its projections saved (PEFT)"),
    _kind("loha", "loha.LoHa", "hada_w1_a hada_w1_b hada_w2_a hada_w2_b", f"hada_t1 hada_t2 alpha {DORA}",
          shape=_loha_shape, rank=_rows("hada_w1_b"), writer="LoHa, with and without Tucker cores"),
    # A row has no alternatives among its required leaves: w1 whole and w1 as a pair are two rows.
    *(
        _kind("lokr", "lokr.LoKr", side, f"lokr_w2 lokr_w2_a lokr_w2_b lokr_t2 alpha {DORA}", shape=_lokr_shape,
              rank=_lokr_rank, writer="LoKr, every factored and whole combination, Tucker")
        for side in ("lokr_w1", "lokr_w1_a lokr_w1_b")
    ),
    _kind("glora", "multiply.GLoRA", "a1 a2 b1 b2", "bm alpha", shape=_glora_shape, rank=_rows("b2"), writer="GLoRA"),
    *(
        _kind("ia3", "multiply.IA3", leaves, shape=_unknown, writer="(IA)³ of LyCORIS and of PEFT")
        for leaves in ("ia3_l", "ia3_weight on_input")
    ),
    _kind("oft", "orthogonal.OFT", "oft_blocks", "rescale alpha", shape=_oft_shape, alpha=CONSTRAINT,
          writer="Diag-OFT and BOFT (LyCORIS), rescaled or constrained"),
    _kind("input oft", "orthogonal.InputOFT", "oft_r", "scaled_oft", shape=_input_oft_shape, writer="OFT (PEFT)"),
    _kind("input boft", "orthogonal.InputBOFT", "boft_r boft_s", shape=_boft_shape, writer="BOFT (PEFT)"),
    _kind("loralib", "loralib.LoRALib", "loralib_a loralib_b", shape=_loralib_shape,
          rank=lambda shapes: shapes["loralib_b"][1], writer="microsoft/loralib: Linear, Embedding, Conv, MergedLinear"),
    _kind("tokens", "full.TokenRows", "token_rows", shape=_unknown, writer="`trainable_token_indices` (PEFT)"),
    *(_full(leaf, WEIGHT) for leaf in ("diff", "w_norm")),
    *(_replace(leaf, WEIGHT) for leaf in ("weight", "set_weight", "scale")),
    *(_full(leaf, BIAS) for leaf in ("diff_b", "b_norm")),
    _kind("lora bias", "full.Full", "bias_up", shape=_of("bias_up"), parameter=BIAS, module_alpha=True,
          writer="`lora_B.bias` (PEFT)"),
    _replace("bias", BIAS),
)  # fmt: skip
"""A row for each set of leaves: kinds that change a weight, then kinds that change a bias. A module may have one delta of
each, and a `replace` beneath another kind (PEFT stores the untouched embedding beside its LoRA)."""

STACKED: Final = "experts"
"""The kind of LoRA on stacked experts: its leaves are those of a LoRA, and the config alone tells them apart."""
AROUND: Final[Mapping[str, tuple[str, str]]] = {
    STACKED: ("experts.ExpertLoRA", "`target_parameters`: stacked experts (PEFT)"),
    "enlarge": ("full.Enlarge", "`reshape_weight` (ComfyUI, FLUX control LoRAs)"),
    "dora": ("dora.DoRA", "DoRA on LoRA, LoHa or LoKr, of outputs or inputs"),
}
"""Kinds made of another kind's leaves and something more: the classes that compute them, and who writes them."""

PAIRS: Final[Mapping[str, str]] = {
    "down": "up", "up": "down", "embedding_down": "embedding_up", "embedding_up": "embedding_down",
    "hada_w1_a": "hada_w1_b", "hada_w1_b": "hada_w1_a", "hada_w2_a": "hada_w2_b", "hada_w2_b": "hada_w2_a",
    "loralib_a": "loralib_b", "loralib_b": "loralib_a",
}  # fmt: skip
"""Leaves that come in pairs, each with its partner: a half alone is an error that can be named."""


def explain(shapes: Shapes) -> tuple[DeltaSpec, ...]:
    """The deltas that a module's leaves make up, accounting for every leaf; raises `InvalidAdapter`."""
    # One kind after the other takes its leaves away, until no row is complete; nothing may be left then.
    left = dict(shapes)
    empty = [f"{leaf} {list(shape)}" for leaf, shape in shapes.items() if 0 in shape]
    if empty:
        raise InvalidAdapter(f"has leaves without elements: {', '.join(empty)}")
    parts = []
    while kind := _largest(left):
        leaves = tuple(leaf for leaf in left if leaf in kind.required | kind.optional)
        require_form(kind.name, {leaf: left[leaf] for leaf in leaves})
        parts.append(DeltaSpec(kind, leaves, kind.shape(left), kind.rank(left)))
        for leaf in leaves:
            del left[leaf]
    if left:
        raise InvalidAdapter(_leftover(left))
    return tuple(parts)


def _largest(left: Shapes) -> Kind | None:
    """The kind that explains the most of the leaves in `left`; all its required leaves must be there."""
    # The most, as kinds contain each other: AdaLoRA's leaves are loralib's and one more.
    fitting = [kind for kind in KINDS if kind.required <= left.keys()]
    return max(fitting, key=lambda kind: len((kind.required | kind.optional) & left.keys()), default=None)


def _leftover(left: Shapes) -> str:
    for leaf, other in PAIRS.items():
        if leaf in left and other not in left:
            return f"has {leaf} but no {other}: half of a pair is missing"
    return f"has {', '.join(sorted(left))}, which no kind of delta explains"


SUM: Final = "sum"
MERGE_METHOD_NAMES: Final = ("ties", "dare", "dare-ties", "knots", "core")
"""The names of the ways in which several changes of one weight become one: `SUM`, or a method of `deltas.methods`."""
