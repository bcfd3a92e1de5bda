__version__: str

from .adapter.adapter import Adapter as Adapter
from .adapter.adapter import Change as Change
from .adapter.load import Assumptions as Assumptions
from .adapter.load import load as load
from .adapter.selection import Selection as Selection
from .adapter.strengths import Strength as Strength
from .adapter.strengths import WeightedAdapter as WeightedAdapter
from .deltas.base import Delta as Delta
from .errors import (
    AmbiguousFile as AmbiguousFile,
)
from .errors import (
    InvalidAdapter as InvalidAdapter,
)
from .errors import (
    InvalidConfig as InvalidConfig,
)
from .errors import (
    InvalidFile as InvalidFile,
)
from .errors import (
    LoratoolError as LoratoolError,
)
from .errors import (
    NeedsBase as NeedsBase,
)
from .errors import (
    NonFinite as NonFinite,
)
from .errors import (
    OutputError as OutputError,
)
from .errors import (
    ShapeMismatch as ShapeMismatch,
)
from .errors import (
    UnknownName as UnknownName,
)
from .errors import (
    UnmatchedModules as UnmatchedModules,
)
from .errors import (
    Unsupported as Unsupported,
)
from .files.hub import fetched as fetched
from .files.tensors import Checkpoint as Checkpoint
from .names import Module as Module
from .numbers.ranks import Budget as Budget
from .numbers.ranks import Rule as Rule
from .verbs.check.check import CheckReport as CheckReport
from .verbs.check.check import Finding as Finding
from .verbs.check.check import check as check
from .verbs.check.fix import fix as fix
from .verbs.combine.combine import CombineReport as CombineReport
from .verbs.combine.combine import combine as combine
from .verbs.compare.checkpoints import CheckpointComparison as CheckpointComparison
from .verbs.compare.compare import (
    AdapterComparison as AdapterComparison,
)
from .verbs.compare.compare import (
    Comparison as Comparison,
)
from .verbs.compare.compare import (
    MatrixComparison as MatrixComparison,
)
from .verbs.compare.compare import (
    compare as compare,
)
from .verbs.compare.compare import (
    compare_to as compare_to,
)
from .verbs.compare.merges import MergeComparison as MergeComparison
from .verbs.convert import ConvertReport as ConvertReport
from .verbs.convert import convert as convert
from .verbs.delta.delta import DeltaReport as DeltaReport
from .verbs.delta.delta import delta as delta
from .verbs.delta.delta import iter_deltas as iter_deltas
from .verbs.edit.edit import EditReport as EditReport
from .verbs.edit.edit import edit as edit
from .verbs.extract.extract import ExtractReport as ExtractReport
from .verbs.extract.extract import extract as extract
from .verbs.hash import Hashes as Hashes
from .verbs.hash import file_hashes as file_hashes
from .verbs.inspect.block_map import Map as Map
from .verbs.inspect.block_map import map_of as map_of
from .verbs.inspect.inspect import AdapterReport as AdapterReport
from .verbs.inspect.inspect import CheckpointReport as CheckpointReport
from .verbs.inspect.inspect import inspect as inspect
from .verbs.merge.merge import MergeReport as MergeReport
from .verbs.merge.merge import merge as merge
from .verbs.meta.meta import (
    MetaReport as MetaReport,
)
from .verbs.meta.meta import (
    copy_metadata as copy_metadata,
)
from .verbs.meta.meta import (
    delete_metadata as delete_metadata,
)
from .verbs.meta.meta import (
    metadata_of as metadata_of,
)
from .verbs.meta.meta import (
    set_metadata as set_metadata,
)
from .verbs.meta.meta import (
    strip_metadata as strip_metadata,
)
from .verbs.report.report import PageReport as PageReport
from .verbs.report.report import report as report
from .verbs.resize import (
    FrontierReport as FrontierReport,
)
from .verbs.resize import (
    LowRankReport as LowRankReport,
)
from .verbs.resize import (
    frontier as frontier,
)
from .verbs.resize import (
    resize as resize,
)
from .verbs.resize import (
    to_lora as to_lora,
)
from .verbs.swap import swap as swap
from .verbs.unmerge.unmerge import UnmergeReport as UnmergeReport
from .verbs.unmerge.unmerge import unmerge as unmerge
