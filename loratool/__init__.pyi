__version__: str

from .adapter.adapter import Adapter as Adapter, Change as Change
from .adapter.load import Assumptions as Assumptions, load as load
from .adapter.selection import Selection as Selection
from .adapter.strengths import Strength as Strength, WeightedAdapter as WeightedAdapter
from .deltas.base import Delta as Delta
from .errors import LoratoolError as LoratoolError
from .files.hub import fetch as fetch
from .files.tensors import Checkpoint as Checkpoint
from .names import Module as Module
from .numbers.ranks import Budget as Budget, Rule as Rule
from .verbs.check.check import CheckReport as CheckReport, Finding as Finding, check as check
from .verbs.check.fix import fix as fix
from .verbs.combine.combine import CombineReport as CombineReport, combine as combine
from .verbs.compare.checkpoints import CheckpointComparison as CheckpointComparison
from .verbs.compare.compare import (
    AdapterComparison as AdapterComparison,
    Comparison as Comparison,
    MatrixComparison as MatrixComparison,
    compare as compare,
    compare_to as compare_to,
)
from .verbs.compare.merges import MergeComparison as MergeComparison
from .verbs.convert import ConvertReport as ConvertReport, convert as convert
from .verbs.delta.delta import DeltaReport as DeltaReport, delta as delta, iter_deltas as iter_deltas
from .verbs.edit.edit import EditReport as EditReport, edit as edit
from .verbs.extract.extract import ExtractReport as ExtractReport, extract as extract
from .verbs.hash import Hashes as Hashes, hash_file as hash_file
from .verbs.inspect.block_map import BlockMap as BlockMap, block_map as block_map
from .verbs.inspect.inspect import AdapterReport as AdapterReport, CheckpointReport as CheckpointReport, inspect as inspect
from .verbs.merge.merge import MergeReport as MergeReport, merge as merge
from .verbs.meta.meta import (
    MetaReport as MetaReport,
    copy_metadata as copy_metadata,
    delete_metadata as delete_metadata,
    read_metadata as read_metadata,
    set_metadata as set_metadata,
    strip_metadata as strip_metadata,
)
from .verbs.report.report import PageReport as PageReport, report as report
from .verbs.resize import (
    FrontierReport as FrontierReport,
    ResizeReport as ResizeReport,
    frontier as frontier,
    resize as resize,
    to_lora as to_lora,
)
from .verbs.swap import swap as swap
from .verbs.unmerge.unmerge import UnmergeReport as UnmergeReport, unmerge as unmerge
