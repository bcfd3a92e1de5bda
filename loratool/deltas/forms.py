"""The shapes that a kind's leaves must have, as forms: a letter stands for one size, the same wherever it occurs.

In a form, `1` is the size 1, `*k` a kernel, which all that have one share, and `*1` any number of ones. No size is 0:
nothing would be left to be added, and torch would broadcast it. What a form cannot say, a kind checks by itself.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import prod
from typing import Final

from loratool.errors import InvalidAdapter

Form = Mapping[str, str]
MOST_KERNEL: Final = 3
"""The most dimensions of a kernel: three, in the convolutions of video models."""

_W1: Final[Sequence[Form]] = ({"lokr_w1": "a b"}, {"lokr_w1_a": "a r", "lokr_w1_b": "r b"})
_W2: Final[Sequence[Form]] = (
    {"lokr_w2": "c d *k"},
    {"lokr_w2_a": "c s", "lokr_w2_b": "s d *1"},
    {"lokr_t2": "s s *k", "lokr_w2_a": "s c", "lokr_w2_b": "s d"},
)
FORMS: Final[Mapping[str, Sequence[Form]]] = {
    "adalora": ({"loralib_a": "r i", "loralib_b": "o r", "lora_e": "r 1"},),
    # The projections are shared by all modules, and as large as the largest of them.
    "vera": ({"vera_lambda_b": "o", "vera_lambda_d": "r", "vera_a": "r i", "vera_b": "n r"},),
    "loha": (
        {"hada_w1_a": "o r", "hada_w1_b": "r i", "hada_w2_a": "o s", "hada_w2_b": "s i"},
        {"hada_t1": "r r *k", "hada_w1_a": "r o", "hada_w1_b": "r i",
         "hada_t2": "s s *k", "hada_w2_a": "s o", "hada_w2_b": "s i"},
    ),
    "lokr": tuple({**one, **two} for one in _W1 for two in _W2),
    "glora": ({"a1": "i r *1", "a2": "r i *1", "b1": "o s *1", "b2": "s i *k"},),
    "ia3": (
        {"ia3_l": "o 1 *1"}, {"ia3_l": "1 i *1"},
        *({"ia3_weight": shape, "on_input": which} for shape in ("n", "n 1 *1", "1 n *1") for which in ("", "1")),
    ),
    "oft": (
        {"oft_blocks": "n b b", "rescale?": "o 1 *1"}, {"oft_blocks": "m n b b", "rescale?": "o 1 *1"},
    ),
    "input oft": ({"oft_r": "n t", "scaled_oft?": "1"},),
    "input boft": ({"boft_r": "m n b b", "boft_s": "o 1"},),
}  # fmt: skip
"""The forms of each kind that has more leaves than a product of two factors; a leaf with ? may be missing."""


def require_form(kind: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises `InvalidAdapter` unless the leaves' shapes are of one of the kind's forms."""
    forms = FORMS.get(kind, ())
    leaves = {leaf.rstrip("?") for form in forms for leaf in form} & shapes.keys()
    fitting = [found for form in forms if (found := _form_of(form, leaves))]
    if not fitting or any(_match_form(form, shapes) for form in fitting):
        return
    met = ", ".join(f"{leaf} {list(shapes[leaf])}" for leaf in sorted(leaves))
    expected = " or ".join(
        ", ".join(f"{leaf} [{', '.join(form[leaf].split())}]" for leaf in sorted(leaves)) for form in fitting[:2]
    )
    raise InvalidAdapter(f"shapes do not fit each other: {met}; expected {expected}, and no size of 0")


def _form_of(form: Form, leaves: Collection[str]) -> Form | None:
    """A form of just these leaves; None where it has others."""
    present = {leaf.rstrip("?"): words for leaf, words in form.items() if leaf.rstrip("?") in leaves}
    needed = {leaf for leaf in form if not leaf.endswith("?")}
    return present if needed <= present.keys() and len(present) == len(leaves) else None


def _match_form(form: Form, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    sizes: dict[str, tuple[int, ...]] = {}
    return all(_match_shape(form[leaf].split(), shapes[leaf], sizes) for leaf in form)


def _match_shape(words: Sequence[str], shape: tuple[int, ...], sizes: dict[str, tuple[int, ...]]) -> bool:
    """Whether a shape is as the words say; `sizes` has what the letters stand for, and learns new ones."""
    kernel = words[-1] if words and words[-1].startswith("*") else ""
    plain = words[:-1] if kernel else words
    head, rest = shape[: len(plain)], shape[len(plain) :]
    if len(head) != len(plain) or (rest and not kernel) or len(rest) > MOST_KERNEL or 0 in shape:
        return False
    if kernel == "*1" and prod(rest) != 1:
        return False
    # A kernel of ones is none: a linear layer and a 1×1 convolution are the same.
    if kernel == "*k" and prod(rest) != 1 and sizes.setdefault(kernel, rest) != rest:
        return False
    return all(
        size == 1 if word == "1" else sizes.setdefault(word, (size,)) == (size,)
        for word, size in zip(plain, head, strict=True)
    )
