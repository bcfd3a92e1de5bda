"""Metadata without what tells of people and their disks: paths, names of datasets, names of users. No torch.

kohya names the folders of its datasets in ss_dataset_dirs, ss_reg_dataset_dirs, ss_tag_frequency and ss_datasets; OneTrainer
keeps its whole configuration in ot_config. Tags and counts stay: they say what the adapter knows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

DROPPED: Final = frozenset(
    {
        "ss_session_id", "ss_config_file", "ss_train_data_dir", "ss_reg_data_dir",
        "ss_pretrained_model_name_or_path", "ot_config", "modelspec.author",
    }
)  # fmt: skip
"""Keys whose values, as a rule, name people, their runs or their disks."""
BY_DATASET: Final = frozenset(
    {"ss_dataset_dirs", "ss_reg_dataset_dirs", "ss_tag_frequency", "dataset_dirs", "tag_frequency"}
)
"""Keys of JSON objects whose own keys are names of folders."""
NAMES_OF_DATASETS: Final = frozenset({"image_dir", "metadata_file", "conditioning_data_dir", "name_or_path", "dataset_path"})
"""Fields that name a folder or a file of a dataset."""
DATASETS: Final = frozenset({"ss_datasets", "datasets", "subsets"})
"""Keys of JSON lists of datasets, whose members have names of their own."""
PATH: Final = re.compile(
    # The start: a file's URL, a drive of Windows, a network share, a home, or a folder at the top. Nothing of that begins
    # within a word or behind a colon or a slash, as the parts of a web address do.
    r"(?:\bfile://|(?<![\w:/\\.-])(?:[A-Za-z]:[\\/]|\\\\|~[\w.-]*/|/(?=[^\s/\"']+/)))"
    # Folders, whose names may hold blanks and commas, as far as the last of them; then a name.
    r"(?:[^\"'\n:;<>|]*[\\/])?[^\"'\s,;<>|]*"
)
"""Text that looks like a path on somebody's disk."""
# Three letters at least: a shorter name would be found in values that have nothing to do with a person.
USER: Final = re.compile(r"(?:/home/|/Users/|[A-Za-z]:[\\/]+Users[\\/]+)([^\\/\"'\s,;]{3,})", re.IGNORECASE)


def without_private(metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata without the keys of `DROPPED`, with datasets under numbers and only the last name of each path, and
    without values that hold the name of a user whom any of the paths gave away."""
    text = "\n".join(metadata.values())
    # Names are collected before paths are cut, from all values. JSON doubles the backslashes of Windows.
    users = {match[1] for match in USER.finditer(text.replace("\\\\", "\\"))}
    clean = {key: _clean(key, value) for key, value in metadata.items() if key not in DROPPED}
    return {key: value for key, value in clean.items() if not any(_names(user, value) for user in users)}


def _clean(key: str, value: str) -> str:
    """One value without what is private: JSON objects and lists member by member, all else as text."""
    try:
        document = json.loads(value)
        cleaned = _clean_text(key, document) if isinstance(document, dict | list) else document
    except (ValueError, RecursionError):
        return _without_paths(value)
    if not isinstance(document, dict | list):
        return _without_paths(value)
    # A document with nothing private keeps its own spelling, and so its bytes.
    return value if cleaned == document else json.dumps(cleaned, ensure_ascii=False)


def _clean_text(key: str, value: Any) -> Any:
    """A part of a JSON document, the member called `key`, without what is private."""
    if isinstance(value, dict):
        # kohya keys its counts by folder (5_my cats): numbers take the folders' place, the counts stay.
        keys = {
            name: f"dataset {place + 1}" if key in BY_DATASET else _without_paths(name) for place, name in enumerate(value)
        }
        # A folder may be called as a field is: below a folder's name, `key` says nothing.
        return {
            keys[name]: "dataset"
            if key in DATASETS and name in ("name", "id", "title") and isinstance(item, str)
            else _clean_text("" if key in BY_DATASET else name, item)
            for name, item in value.items()
        }
    if isinstance(value, list):
        return [_clean_text(key, item) for item in value]
    if key in NAMES_OF_DATASETS:
        return None if value is None else "dataset"
    return _without_paths(value) if isinstance(value, str) else value


def _without_paths(text: str) -> str:
    """`text` with each path cut to its last name: a model's file name tells what an adapter is for, its folder whose disk it
    lay on."""
    return PATH.sub(lambda match: re.split(r"[\\/]+", match[0].rstrip("\\/"))[-1], text)


def _names(user: str, value: str) -> bool:
    """Whether a value holds a user's name as a whole word, in letters of either case."""
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(user)}(?![A-Za-z0-9])", value, re.IGNORECASE) is not None
